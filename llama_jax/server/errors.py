"""Errors: the one table of statuses, codes and texts, Cloudflare's and OpenAI's.

Every error has Cloudflare's envelope, and beside it the object that OpenAI's clients read. An error
of Workers AI begins with `AiError: ` and ends with the request's id. An error of Cloudflare's front
door, which comes before any model is chosen, is the bare text; its result is null. On OpenAI's
routes the status and the object are OpenAI's own.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from llama_jax.engine.delivery import NotFiniteError
from llama_jax.engine.refusals import ClientShareError, ContextError, QueueFullError
from llama_jax.errors import InputError
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.types import Error, ErrorNote, OpenAIError


class OpenAIKind(NamedTuple):
    """What OpenAI returns for an error; the placeholders are those of the other text."""

    status: int
    code: str | None
    text: str
    type: str = "invalid_request_error"


class Kind(NamedTuple):
    """An error that a client can get."""

    status: int
    code: int
    text: str
    openai: OpenAIKind
    front_door: bool = False
    chain: tuple[int, str] | None = None
    """The cause: code and text."""
    retry_after_s: int | None = None
    rejection: str | None = None
    """Why a request was refused that may be accepted later; the metrics' name for it."""


NO_TOKEN = Kind(
    *(400, 9106, "Missing X-Auth-Key, X-Auth-Email or Authorization headers"),
    OpenAIKind(401, "invalid_api_key", "You didn't provide an API key; send it as Bearer token"),
    front_door=True,
)
BAD_HEADER = Kind(
    *(400, 6003, "Invalid request headers"),
    OpenAIKind(401, "invalid_api_key", "The Authorization header is not Bearer and an API key"),
    front_door=True,
    chain=(6111, "Invalid format for Authorization header"),
)
WRONG_TOKEN = Kind(
    *(401, 10000, "Authentication error"),
    OpenAIKind(401, "invalid_api_key", "Incorrect API key provided"),
    front_door=True,
)
_ORIGIN = (
    "pages of {!r:.80} are not allowed; add that origin to --allowed_origins, or give the server "
    "an API token"
)
WRONG_ORIGIN = Kind(
    *(403, 9109, f"Unauthorized to access requested resource: {_ORIGIN}"),
    OpenAIKind(403, None, _ORIGIN, "permission_error"),
    front_door=True,
)
_HOST = (
    "{!r:.80} is not a name of this machine; give the server an API token, or start it with "
    "--insecure"
)
WRONG_HOST = Kind(
    *(403, 9109, f"Unauthorized to access requested resource: {_HOST}"),
    OpenAIKind(403, None, _HOST, "permission_error"),
    front_door=True,
)
NO_ROUTE = Kind(
    *(404, 7000, "No route for that URI"),
    OpenAIKind(404, "unknown_url", "Unknown request URL: {} {}"),
    front_door=True,
)
WRONG_METHOD = Kind(
    *(405, 7001, "{} not supported for requested URI."),
    OpenAIKind(405, "method_not_supported", "{} is not allowed on this URL"),
    front_door=True,
)
NO_RECEIPT = Kind(
    *(404, 7003, "No receipt {!r:.80} is here: {}"),
    OpenAIKind(404, "receipt_not_found", "No receipt {!r:.80} is here: {}"),
    front_door=True,
)

BAD_INPUT = Kind(400, 5006, "Bad input: Error: {}", OpenAIKind(400, "invalid_value", "{}"))
UNSUPPORTED = Kind(
    400, 5006, "Bad input: Error: {}", OpenAIKind(400, "unsupported_parameter", "{}")
)
NO_MODEL = Kind(
    *(400, 5007, "No such model: No such model {} or task"),
    OpenAIKind(404, "model_not_found", "The model `{}` does not exist"),
)
TOO_LONG = Kind(
    413,
    5021,
    "Ai: The estimated number of input and maximum output tokens ({0}) exceeded this model "
    "context window limit ({1}).",
    OpenAIKind(
        400,
        "context_length_exceeded",
        "This model's maximum context length is {1} tokens. However, you requested {0} tokens "
        "({2} in the prompt, {3} in the completion). Please reduce one of them.",
    ),
)
TOO_LARGE = Kind(
    *(413, 3006, "Ai: Request is too large"),
    OpenAIKind(413, "request_too_large", "The request's body is too large"),
)
TIMEOUT = Kind(
    *(408, 3007, "Ai: Request timeout"),
    OpenAIKind(408, "timeout", "The request exceeded the server's time limit", "server_error"),
)
FULL = Kind(
    *(429, 3040, "Ai: Capacity temporarily exceeded, please try again."),
    OpenAIKind(
        *(429, "rate_limit_exceeded"),
        "The server's queue is full, please try again later",
        "rate_limit_error",
    ),
    retry_after_s=1,
    rejection="queue_full",
)
CLIENT_FULL = FULL._replace(
    openai=FULL.openai._replace(
        text="Too many requests from your address wait already, please try again later"
    ),
    rejection="client_share",
)
UNAVAILABLE = Kind(
    *(503, 5001, "Ai: The model is not available now: {}"),
    OpenAIKind(503, "service_unavailable", "The model is not available now: {}", "server_error"),
    retry_after_s=5,
    rejection="unavailable",
)
BODIES_FULL = UNAVAILABLE._replace(rejection="large_bodies")
CONNECTIONS_FULL = UNAVAILABLE._replace(rejection="connections")
NOT_HTTP = Kind(
    *(400, 6003, "The request is not valid HTTP: {}"),
    OpenAIKind(400, "invalid_http", "The request is not valid HTTP: {}"),
    front_door=True,
)
HEAD_TOO_LARGE = Kind(
    *(431, 6003, "The request line and headers exceed {} bytes"),
    OpenAIKind(431, "headers_too_large", "The request line and headers exceed {} bytes"),
    front_door=True,
)
INTERNAL = Kind(
    *(500, 5000, "Ai: Internal server error"),
    OpenAIKind(500, None, "The server had an error while processing your request", "server_error"),
)

NOT_FINITE = Kind(
    *(500, 5000, "Ai: Internal server error: {}"),
    OpenAIKind(500, "logits_not_finite", "{}", "server_error"),
)

REFUSAL = "llama_jax.refusal"
"""Key of a request's scope: the error by which the connection refuses it, if it does."""

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""XLA's status in the text of such an error."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its response.

    Args:
        kind: which error of the table.
        *details: the values for the text's placeholders.
        param: the parameter of the request that is wrong.
        headers: additional headers of the response.
    """

    def __init__(
        self,
        kind: Kind,
        *details: object,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.kind, self.param = kind, param
        self.text = kind.text.format(*details)
        self._openai_text = kind.openai.text.format(*details)
        self.headers = dict(headers or {})
        if kind.retry_after_s is not None:
            self.headers["retry-after"] = str(kind.retry_after_s)
        super().__init__(self.text)

    def status(self, openai: bool = False) -> int:
        """Return the HTTP status, on OpenAI's routes or on others."""
        return self.kind.openai.status if openai else self.kind.status

    def body(self, request_id: str, openai: bool = False) -> Error:
        """Return the envelope, and beside it the object that OpenAI's clients read."""
        kind = self.kind
        text = self.text if kind.front_door else f"AiError: {self.text} ({request_id})"
        error: ErrorNote = {"message": text, "code": kind.code}
        if kind.chain:
            code, reason = kind.chain
            error["error_chain"] = [{"code": code, "message": reason}]
        return {
            "errors": [error],
            "success": False,
            "result": None if kind.front_door else {},
            "messages": [],
            "error": self._openai_error() if openai else self._native_error(text),
        }

    def reply(self, request_id: str, openai: bool = False) -> CompactJSONResponse:
        """Return the whole response."""
        return CompactJSONResponse(self.body(request_id, openai), self.status(openai), self.headers)

    def _openai_error(self) -> OpenAIError:
        kind = self.kind.openai
        return {
            "message": self._openai_text,
            "type": kind.type,
            "param": self.param,
            "code": kind.code,
        }

    def _native_error(self, text: str) -> OpenAIError:
        other = "server_error" if self.kind.status >= 500 else "invalid_request_error"
        return {
            "message": text,
            "type": _TYPES.get(self.kind.status, other),
            "param": self.param,
            "code": str(self.kind.code),
        }


def to_api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an exception; a bug's details stay in the log."""
    match error:
        case ApiError():
            return error
        case ContextError():
            counts = error.prompt_tokens, error.max_tokens
            return ApiError(TOO_LONG, sum(counts), error.context, *counts)
        case InputError():
            return ApiError(BAD_INPUT, error)
        case NotFiniteError():
            return ApiError(NOT_FINITE, error)
        case ClientShareError():
            return ApiError(CLIENT_FULL)
        case QueueFullError():
            return ApiError(FULL)
        case TimeoutError():
            # Without this header the official clients would repeat the request twice.
            return ApiError(TIMEOUT, headers={"x-should-retry": "false"})
        case jax.errors.JaxRuntimeError() if _OUT_OF_MEMORY in str(error):
            return ApiError(UNAVAILABLE, "its device is out of memory")
    return ApiError(INTERNAL)
