"""Requests: the lines of a batch's input, which are read several times."""

import contextlib
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from llama_jax.errors import InputError
from llama_jax.regular_file import kind_of

LINE_BYTES = 2**24
"""The longest line of input: twice the body of a request that the server takes by default."""

_BLOCK = 2**20  # bytes of a pipe that are copied at a time


class Requests:
    """The lines of a file of requests, which may be a pipe or a terminal.

    Those can be read once only, so they are copied into a temporary file first, until their end.
    It has no name, so nothing of it is left, however the process ends.

    Args:
        path: JSON lines; empty ones are skipped.

    Raises:
        InputError: it is a device or a line is longer than LINE_BYTES.
        OSError: it cannot be read, or there is no room for the copy.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        status = path.stat()
        self._file: BinaryIO = _open(path, status)
        try:
            self.total = sum(1 for _ in self)
        except BaseException:  # an interrupt too: nobody else can close it
            self.close()
            raise

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line that is not empty with its number from 1."""
        number = position = 0
        while True:
            self._file.seek(position)  # several may iterate in turn
            line = self._file.readline(LINE_BYTES + 1)
            number, position = number + 1, position + len(line)
            if len(line) > LINE_BYTES:
                raise InputError(
                    f"{self.path}, line {number}, has more than {LINE_BYTES:,} bytes, expected "
                    "JSON lines, a request each; name another file"
                )
            if not line:
                return
            if line.strip():
                yield number, line

    def is_file(self, status: os.stat_result) -> bool:
        """Tell whether a file with this status is the one that the lines are read from."""
        return os.path.samestat(os.fstat(self._file.fileno()), status)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _open(path: pathlib.Path, status: os.stat_result) -> BinaryIO:
    """Open a file, or the copy of a pipe."""
    mode = status.st_mode
    # On macOS /dev/stdin and /dev/fd/N share their position with whoever opened them.
    if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and path.parts[:2] != ("/", "dev")):
        return path.open("rb")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or _is_terminal(path, status)):
        raise InputError(
            f"{path} is {kind_of(status)}, expected a file or a pipe of JSON lines; name another "
            "file"
        )
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (returned)
    try:
        with path.open("rb") as pipe:
            _copy(path, pipe, copy)
    except BaseException:  # an interrupt too
        with contextlib.suppress(OSError):  # on a full disk the rest cannot be written either
            copy.close()
        raise
    return copy  # pyright: ignore[reportReturnType] (a BinaryIO in all but name)


def _copy(path: pathlib.Path, pipe: BinaryIO, copy: BinaryIO) -> None:
    """Copy a pipe to its end."""
    try:
        while block := pipe.read(_BLOCK):
            copy.write(block)
        copy.flush()
    except OSError as error:
        raise InputError(
            f"{path} cannot be copied to {tempfile.gettempdir()} ({error.strerror or error}); make "
            "room there, let TMPDIR name another folder, or name a file"
        ) from None


def _is_terminal(path: pathlib.Path, status: os.stat_result) -> bool:
    if not stat.S_ISCHR(status.st_mode):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOCTTY", 0))
    except OSError:
        return False
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)
