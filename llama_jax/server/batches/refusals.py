"""Refusals: the errors of batches and their files; see `server.errors`."""

from llama_jax.server.errors import Kind, OpenAIKind


def _kind(status: int, code: int, name: str | None, text: str, type_: str | None = None) -> Kind:
    """Return an error that has one status and one text on all routes."""
    own = "server_error" if status >= 500 else "invalid_request_error"
    return Kind(status, code, text, OpenAIKind(status, name, text, type_ or own), front_door=True)


NO_BATCHES = _kind(
    *(404, 7003, "batches_not_enabled"),
    "This server stores no batches and files; start it with --batch_dir=FOLDER",
)
NO_FILE = _kind(404, 7003, "file_not_found", "No such File object: {!s:.80}")
NO_BATCH = _kind(404, 7003, "batch_not_found", "No batch found with id {!r:.80}")
FILE_IN_USE = _kind(
    *(409, 7003, "file_in_use"),
    "{!s:.80} is the input of {}, which has not ended; wait for its end, or cancel it",
)
BATCH_ENDED = _kind(
    409, 7003, "batch_not_cancellable", "{!s:.80} is {}, expected a batch that has not ended"
)
STORAGE_FULL = _kind(
    *(507, 3006, "storage_full"),
    "There is no room on the server: {}; delete files, or wait until some expire",
)
LINE_FAILED = _kind(
    *(500, 5000, "server_error"),
    "The request was begun {} times, and the engine failed or ended each time",
)
UNREADABLE_LINE = _kind(
    500, 5000, "unreadable_line", "Line {} of the input cannot be read any more: {}"
)
