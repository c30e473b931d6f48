"""OpenAI's routes of files: upload, list, get, read and delete."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, BinaryIO

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from llama_jax.errors import InputError, one_line
from llama_jax.server.batches.batches import Batches
from llama_jax.server.batches.refusals import NO_BATCHES, NO_FILE
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.errors import ApiError
from llama_jax.server.in_thread import in_thread
from llama_jax.server.openai.batch_types import ExpiresAfter, FileDeleted, FileObject
from llama_jax.server.transfers import FORM
from llama_jax.server.workers_ai import service_of

MAX_FILES_PAGE = 10_000

_PART_BYTES = 256 * 2**10
_FIELDS = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
_LOGGER = logging.getLogger("llama_jax.server")


async def create_file(request: Request) -> Response:
    """POST .../files: upload a batch's input."""
    batches = batches_of(request)
    upload, keep_s = _parse(request.scope[FORM])
    size, name = upload.size or 0, upload.filename or ""
    if size > batches.settings.max_file_bytes:
        most = f"{batches.settings.max_file_bytes:,}"
        raise InputError(f"the file has {size:,} bytes, expected at most {most}")
    row = await in_thread(batches.files.add, upload.file, size, "batch", name[:255], keep_s)
    return CompactJSONResponse(describe(row))


async def list_files(request: Request) -> Response:
    """GET .../files: a page of the files."""
    batches, query = batches_of(request), request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InputError(f"order is {order!r:.40}, expected asc or desc")
    limit = page_limit(query, MAX_FILES_PAGE, MAX_FILES_PAGE)
    rows, has_more = await in_thread(
        batches.files.page, query.get("after"), limit, query.get("purpose"), order == "desc"
    )
    return CompactJSONResponse(page([*map(describe, rows)], has_more))


async def get_file(request: Request) -> Response:
    """GET .../files/{id}: what is known of a file."""
    batches, file_id = batches_of(request), request.path_params["file_id"]
    return CompactJSONResponse(describe(await in_thread(batches.files.get, file_id)))


async def delete_file(request: Request) -> Response:
    """DELETE .../files/{id}: delete a file."""
    batches, file_id = batches_of(request), request.path_params["file_id"]
    await in_thread(batches.files.delete, file_id)
    deleted: FileDeleted = {"id": file_id, "object": "file", "deleted": True}
    return CompactJSONResponse(deleted)


async def read_file(request: Request) -> Response:
    """GET .../files/{id}/content: a file's bytes."""
    batches, file_id = batches_of(request), request.path_params["file_id"]

    def open_file() -> tuple[dict[str, Any], BinaryIO]:
        row = batches.files.get(file_id)
        try:
            return row, batches.files.folder.path(file_id).open("rb")
        except OSError as error:
            _LOGGER.error("%s cannot be read: %s", file_id, error)
            raise ApiError(NO_FILE, file_id) from error

    row, file = await in_thread(open_file)
    headers = {"content-length": str(row["bytes"])}
    return StreamingResponse(_parts(file), 200, headers, "application/octet-stream")


async def _parts(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while part := await in_thread(file.read, _PART_BYTES):
            yield part


def batches_of(request: Request) -> Batches:
    """Return what is stored of batches.

    Raises:
        ApiError: nothing is.
    """
    batches = service_of(request).batches
    if batches is None:
        raise ApiError(NO_BATCHES)
    return batches


def page_limit(query: Mapping[str, str], default: int, largest: int) -> int:
    """Return how many entries a page has at most.

    Raises:
        InputError: it is no number, or out of range.
    """
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:20]) <= largest):
        raise InputError(f"limit is {text!r:.40}, expected an integer from 1 to {largest:,}")
    return int(text)


def page(entries: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return a page of a list."""
    first, last = (entries[0]["id"], entries[-1]["id"]) if entries else (None, None)
    head = {"object": "list", "data": entries, "first_id": first, "last_id": last}
    return head | {"has_more": has_more}


def describe(row: Mapping[str, Any]) -> FileObject:
    """Return a file as OpenAI's clients know it."""
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
    }


def checked(cls: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    """Return a model of what a client sent.

    Raises:
        InputError: naming everything that is wrong.
    """
    try:
        return cls(**fields)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc']))} is {each['input']!r:.60}: {each['msg']}"
            if each["type"] not in ("missing", "extra_forbidden")
            else f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
            for each in error.errors()
        ]
        raise InputError(one_line(problems)) from None


def _parse(form: FormData) -> tuple[UploadFile, float | None]:
    """Return the file of a form, and how long it is to be kept."""
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise InputError("the form has no file, expected the part `file` with a filename")
    if purpose != "batch":
        raise InputError(f"purpose is {purpose!r:.40}, expected 'batch': no other has a use here")
    if unknown := form.keys() - _FIELDS:
        raise InputError(
            f"the form has {', '.join(sorted(unknown)):.80}, expected {sorted(_FIELDS)}"
        )
    anchor, seconds = (form.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return upload, None
    if isinstance(seconds, str) and seconds.isascii() and seconds[:20].isdecimal():
        seconds = int(seconds[:20])
    fields = {"anchor": anchor, "seconds": seconds}
    return upload, checked(ExpiresAfter, fields).seconds
