"""Errors: Cloudflare's envelope, and the one table of statuses, codes and texts.

An error of Workers AI begins with `AiError: ` and ends with the request's id. An error of
Cloudflare's front door, which comes before any model is chosen, is the bare text; its result is
null.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llama_jax.engine.engine import ContextError, QueueFullError
from llama_jax.errors import InputError
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.types import Error, ErrorNote


class Kind(NamedTuple):
    """One row of the table."""

    status: int
    code: int
    text: str
    front_door: bool = False
    chain: tuple[int, str] | None = None
    """The cause: code and text."""
    retry_after_s: int | None = None


NO_TOKEN = Kind(400, 9106, "Missing X-Auth-Key, X-Auth-Email or Authorization headers", True)
BAD_HEADER = Kind(
    *(400, 6003, "Invalid request headers", True),
    chain=(6111, "Invalid format for Authorization header"),
)
WRONG_TOKEN = Kind(401, 10000, "Authentication error", True)
WRONG_ORIGIN = Kind(
    *(403, 9109),
    "Unauthorized to access requested resource: pages of {!r:.80} are not allowed; add that "
    "origin to --allowed_origins, or give the server an API token",
    front_door=True,
)
WRONG_HOST = Kind(
    *(403, 9109),
    "Unauthorized to access requested resource: {!r:.80} is not a name of this machine; give "
    "the server an API token, or start it with --insecure",
    front_door=True,
)
NO_ROUTE = Kind(404, 7000, "No route for that URI", True)
WRONG_METHOD = Kind(405, 7001, "{} not supported for requested URI.", True)

BAD_INPUT = Kind(400, 5006, "Bad input: Error: {}")
NO_MODEL = Kind(400, 5007, "No such model: No such model {} or task")
TOO_LONG = Kind(
    *(413, 5021),
    "Ai: The estimated number of input and maximum output tokens ({}) exceeded this model "
    "context window limit ({}).",
)
TOO_LARGE = Kind(413, 3006, "Ai: Request is too large")
TIMEOUT = Kind(408, 3007, "Ai: Request timeout")
FULL = Kind(429, 3040, "Ai: Capacity temporarily exceeded, please try again.", retry_after_s=1)
UNAVAILABLE = Kind(503, 5001, "Ai: The model is not available now: {}", retry_after_s=5)
INTERNAL = Kind(500, 5000, "Ai: Internal server error")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its response.

    Args:
        kind: the row of the table.
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
        self.headers = dict(headers or {})
        if kind.retry_after_s is not None:
            self.headers["retry-after"] = str(kind.retry_after_s)
        super().__init__(self.text)

    def body(self, request_id: str) -> Error:
        """Return the envelope, and beside it the object that OpenAI's clients read."""
        kind = self.kind
        text = self.text if kind.front_door else f"AiError: {self.text} ({request_id})"
        error: ErrorNote = {"message": text, "code": kind.code}
        if kind.chain:
            code, reason = kind.chain
            error["error_chain"] = [{"code": code, "message": reason}]
        other = "server_error" if kind.status >= 500 else "invalid_request_error"
        return {
            "errors": [error],
            "success": False,
            "result": None if kind.front_door else {},
            "messages": [],
            "error": {
                "message": text,
                "type": _TYPES.get(kind.status, other),
                "param": self.param,
                "code": str(kind.code),
            },
        }

    def reply(self, request_id: str) -> CompactJSONResponse:
        """Return the whole response."""
        return CompactJSONResponse(self.body(request_id), self.kind.status, self.headers)


def to_api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an exception; a bug's details stay in the log."""
    match error:
        case ApiError():
            return error
        case ContextError():
            return ApiError(TOO_LONG, error.prompt_tokens + error.max_tokens, error.context)
        case InputError():
            return ApiError(BAD_INPUT, error)
        case QueueFullError():
            return ApiError(FULL)
        case TimeoutError():
            # Without this header the official clients would repeat the request twice.
            return ApiError(TIMEOUT, headers={"x-should-retry": "false"})
    return ApiError(INTERNAL)
