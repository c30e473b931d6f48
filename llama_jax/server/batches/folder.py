"""Folder: the files of batches on disk. One server has it at a time."""

import contextlib
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO

from llama_jax.errors import InputError
from llama_jax.server.batches.database import Database

_NEW = ".new"
_BLOCK = 2**20


class Folder:
    """A folder with a database and a file for each id.

    Args:
        path: created if it is not there.

    Raises:
        InputError: it cannot be used, or another server has it.
    """

    def __init__(self, path: pathlib.Path):
        self._files = path / "files"
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._lock: BinaryIO = (path / "lock").open("ab")
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror or error}; name another folder for batches"
            ) from None
        try:
            _lock(self._lock, path)
            self.database = Database(path / "batches.sqlite")
        except BaseException:  # an interrupt too: the lock must not stay
            self._lock.close()
            raise

    def close(self) -> None:
        """Release it."""
        self.database.close()
        self._lock.close()

    def path(self, file_id: str) -> pathlib.Path:
        """Return where a file is, or is to be."""
        return self._files / file_id

    def write(self, file_id: str, parts: Iterable[bytes]) -> int:
        """Write a file whole, or not at all; return its bytes.

        Raises:
            OSError: it cannot be written, such as on a full disk.
        """
        new = self._files / f"{file_id}{_NEW}"
        try:
            with new.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            new.replace(self.path(file_id))
        except BaseException:  # an interrupt too: nothing else removes it before the next start
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        return size

    def copy(self, file_id: str, source: BinaryIO) -> int:
        """Write a file from an open one, from its beginning; see `write`."""
        source.seek(0)
        return self.write(file_id, iter(lambda: source.read(_BLOCK), b""))

    def remove(self, file_id: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with contextlib.suppress(OSError):  # the start removes what nothing names
            self.path(file_id).unlink(missing_ok=True)

    def lines(self, file_id: str, longest: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield each line that is not empty, with its number from 1 and where it begins.

        Of a line longer than `longest` bytes, the beginning is the last that is yielded.

        Raises:
            OSError: it cannot be read.
        """
        with self.path(file_id).open("rb") as file:
            start = number = 0
            while line := file.readline(longest + 1):
                number += 1
                if line.strip():
                    yield number, start, line
                if len(line) > longest:
                    return
                start += len(line)

    def read(self, file_id: str, start: int, size: int) -> bytes:
        """Return some bytes of a file.

        Raises:
            OSError: it cannot be read.
        """
        with self.path(file_id).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def keep_only(self, file_ids: Collection[str]) -> None:
        """Remove all other files: what a process that was killed had begun."""
        for path in self._files.iterdir():
            if path.name not in file_ids:
                self.remove(path.name)


def _lock(file: BinaryIO, path: pathlib.Path) -> None:
    """Lock the folder until its file is closed, or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two servers of one folder are not detected
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{path} is in use by another server, expected one for each folder of batches; name "
            "another folder"
        ) from None
