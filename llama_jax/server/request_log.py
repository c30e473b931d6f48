"""RequestLog: one HTTP request, and what becomes known of it while it is answered."""

import dataclasses
import logging
import time
import uuid

from starlette.types import Scope

from llama_jax.engine.result import Result
from llama_jax.server.errors import INTERNAL, ApiError, to_api_error

_LOGGER = logging.getLogger("llama_jax.server")


@dataclasses.dataclass
class RequestLog:
    """What the access log and the metrics want to know of a request."""

    method: str
    path: str
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    began: float = dataclasses.field(default_factory=time.perf_counter)
    route: str = "none"
    """The name of what answers it."""
    status: int | None = None
    """None: nothing was sent."""
    error: ApiError | None = None
    """What the client was told, be it in the midst of a stream."""
    prompt_tokens: int = 0
    """Of all prompts that were submitted."""
    completion_tokens: int = 0
    """That came so far, of all answers."""
    results: list[Result] = dataclasses.field(default_factory=list)
    """Of the answers that came to their end."""
    disconnected: bool = False
    """The client went away before it had everything."""
    first_text_s: float | None = None
    """Seconds from its arrival to the first tokens."""
    last_text_s: float | None = None
    """To the last ones so far."""

    @property
    def duration_s(self) -> float:
        """Seconds from its arrival to now."""
        return time.perf_counter() - self.began

    @property
    def s_per_token(self) -> float | None:
        """Seconds by token after the first of an answer, None unless there is just one answer."""
        if len(self.results) != 1 or len(self.results[0].tokens) < 2:
            return None
        if self.first_text_s is None or self.last_text_s is None:
            return None
        return (self.last_text_s - self.first_text_s) / (len(self.results[0].tokens) - 1)

    def record_tokens(self, count: int) -> None:
        """Note that there are new tokens."""
        self.completion_tokens += count
        self.last_text_s = self.duration_s
        if self.first_text_s is None:
            self.first_text_s = self.last_text_s

    def fail(self, error: Exception) -> ApiError:
        """Note what went wrong; return what the client is to be told. A bug is logged."""
        self.error = to_api_error(error)
        if self.error.kind is INTERNAL:
            _LOGGER.error("request %s failed", self.id, exc_info=error)
        return self.error


def request_log_of(scope: Scope) -> RequestLog:
    """Return the call that the gate made for a request."""
    return scope["llama_jax.call"]
