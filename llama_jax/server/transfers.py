"""Transfers: files that are uploaded and downloaded, which are larger than other bodies and slower.

An upload goes to the disk as it comes. A download has no time limit as a whole: only a client that
takes nothing for long is cut off.
"""

import asyncio
import re
from collections.abc import AsyncGenerator

from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message, Receive, Scope, Send

from llama_jax.errors import InputError
from llama_jax.server import errors
from llama_jax.server.body import read_part
from llama_jax.server.errors import ApiError

UPLOAD_S = 3600.0
"""For a whole upload: 200 MB at 0.5 Mbit/s."""

MAX_UPLOADS = 4
"""At a time; each may take as much of the disk as the largest file."""

FORM = "llama_jax.form"
"""Key of a request's scope: the form that was uploaded."""

_FORM_BYTES = 64 * 2**10
"""Of an upload beside the file: names, other fields and boundaries."""

_BASE = r"(?:/client/v4/accounts/[^/]+/ai)?/v1/files"
_UPLOAD, _DOWNLOAD = re.compile(_BASE), re.compile(rf"{_BASE}/[^/]+/content")


class Uploads:
    """Reads uploads; counts those under way.

    Args:
        max_bytes: of one file.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self._under_way = max_bytes, 0

    def takes(self, scope: Scope) -> bool:
        """Return whether a request is an upload."""
        return scope["method"] == "POST" and _UPLOAD.fullmatch(scope["path"]) is not None

    async def read(self, scope: Scope, receive: Receive) -> FormData:
        """Read the form of an upload; its file may be on the disk.

        Raises:
            ApiError: the file is too large, too many are under way, or nothing came for too long.
            InputError: it is no form.
            DisconnectedError: the client closed the connection.
        """
        if self._under_way >= MAX_UPLOADS:
            raise ApiError(
                *(errors.BODIES_FULL, "too many uploads are under way"),
                headers={"connection": "close"},
            )
        self._under_way += 1
        try:
            async with asyncio.timeout(UPLOAD_S):
                return await self._read(scope, receive)
        except TimeoutError:
            raise ApiError(errors.TIMEOUT, headers={"connection": "close"}) from None
        finally:
            self._under_way -= 1

    async def _read(self, scope: Scope, receive: Receive) -> FormData:
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise InputError(f"content-type is {kind!r:.60}, expected multipart/form-data")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes + _FORM_BYTES:
            raise ApiError(errors.TOO_LARGE, headers={"connection": "close"})
        parser = MultiPartParser(
            *(headers, self._parts(scope, receive)),
            max_files=1,
            max_fields=8,
            max_part_size=_FORM_BYTES // 8,
        )
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise InputError(
                f"the form is wrong ({error.message}), expected one file and its purpose"
            ) from None

    async def _parts(self, scope: Scope, receive: Receive) -> AsyncGenerator[bytes, None]:
        size, more = 0, True
        while more:
            part, more = await read_part(scope, receive)
            size += len(part)
            if size > self._max_bytes + _FORM_BYTES:
                raise ApiError(errors.TOO_LARGE, headers={"connection": "close"})
            if part:
                yield part
        yield b""


def is_download(scope: Scope) -> bool:
    """Return whether a request reads a file."""
    return scope["method"] == "GET" and _DOWNLOAD.fullmatch(scope["path"]) is not None


def patient(send: Send, seconds: float) -> Send:
    """Return a `send` that fails if the client takes nothing for so long."""

    async def send_in_time(message: Message) -> None:
        async with asyncio.timeout(seconds):
            await send(message)

    return send_in_time
