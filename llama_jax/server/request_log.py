"""RequestLog: what the access log and the metrics record of an HTTP request."""

import dataclasses
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from llama_jax.engine.result import Result
from llama_jax.server.errors import INTERNAL, UNAVAILABLE, ApiError, to_api_error
from llama_jax.server.types import Error

_LOGGER = logging.getLogger("llama_jax.server")
MAX_SESSION = 128
"""Characters of a session's name in the log. A header may have thousands."""

_OPENAI_PATHS = re.compile(
    r"(/client/v4/accounts/[^/]+/ai)?/(v1(/.*)?|tokenize|detokenize|tokenizer_info)"
)


@dataclasses.dataclass
class RequestLog:
    """The record of one HTTP request, filled in while it is served."""

    method: str
    path: str
    client: str = ""
    """The client's address; empty: unknown."""
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    session_id: str | None = None
    """The header X-Session-ID, shortened to `MAX_SESSION`; None: there was none."""
    session_affinity: str | None = None
    """The header x-session-affinity, likewise."""
    began: float = dataclasses.field(default_factory=time.perf_counter)
    route: str = "none"
    """Name of the route's handler."""
    status: int | None = None
    """Status of the response; None: nothing was sent."""
    error: ApiError | None = None
    """The error returned to the client, as a response or within a stream."""
    prompt_tokens: int = 0
    """Tokens of all prompts submitted."""
    longest_prompt: int = 0
    """Tokens of the longest of them."""
    completion_tokens: int = 0
    """Tokens of all generations so far."""
    receipt_ids: list[str] = dataclasses.field(default_factory=list)
    """The receipts of the generations submitted; empty: none are kept."""
    results: list[Result] = dataclasses.field(default_factory=list)
    """Results of the generations that completed."""
    disconnected: bool = False
    """Whether the client disconnected before the response ended."""
    first_text_s: float | None = None
    """Time to first token (TTFT), from the request's arrival."""
    last_text_s: float | None = None
    """Time to the latest token, from the request's arrival."""

    @property
    def duration_s(self) -> float:
        """Seconds since the request's arrival."""
        return time.perf_counter() - self.began

    @property
    def s_per_token(self) -> float | None:
        """Mean inter-token latency; None unless there is exactly one generation."""
        if len(self.results) != 1 or len(self.results[0].tokens) < 2:
            return None
        if self.first_text_s is None or self.last_text_s is None:
            return None
        return (self.last_text_s - self.first_text_s) / (len(self.results[0].tokens) - 1)

    def record_session(self, headers: Headers) -> None:
        """Record the names by which a router in front keeps a session on one server."""
        self.session_id = _shortened(headers.get("x-session-id"))
        self.session_affinity = _shortened(headers.get("x-session-affinity"))

    def record_tokens(self, count: int) -> None:
        """Record new tokens."""
        self.completion_tokens += count
        self.last_text_s = self.duration_s
        if self.first_text_s is None:
            self.first_text_s = self.last_text_s

    def fail(self, error: Exception) -> None:
        """Record an exception as the error for the client; a bug or the device's is logged."""
        self.error = to_api_error(error)
        if self.error.kind is INTERNAL:
            _LOGGER.error("request %s failed", self.id, exc_info=error)
        elif self.error.kind is UNAVAILABLE and self.error is not error:
            _LOGGER.error("request %s failed: %.500s", self.id, error)

    def error_body(self) -> Error:
        """Return the body for the recorded error, in the form of the request's route."""
        assert self.error is not None
        return self.error.body(self.id, self._is_openai)

    def error_reply(self) -> Response:
        """Return the response for the recorded error, in the form of the request's route."""
        assert self.error is not None
        return self.error.reply(self.id, self._is_openai)

    @property
    def _is_openai(self) -> bool:
        return _OPENAI_PATHS.fullmatch(self.path) is not None


def _shortened(name: str | None) -> str | None:
    if name is None or len(name) <= MAX_SESSION:
        return name
    return f"{name[: MAX_SESSION - 1]}…"


def request_log_of(scope: Scope) -> RequestLog:
    """Return the log that `RequestMiddleware` opened for a request."""
    return scope["llama_jax.log"]
