"""Files of bounded size: nothing is read from a pipe or a device, and nothing without a limit."""

import errno
import io
import os
import pathlib
import stat

TEXT_BYTES = 2**24
"""The largest text file that is read whole: JSON, a tokenizer, a list of checksums.

Those of Llama 2 have at most 2.5 MB: the manifest of 70B from eight shards. JSON takes some 25
times its size once it is parsed, so more would not fit beside the weights.
"""

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: str | pathlib.Path) -> os.stat_result:
    """Return the status of a regular file, or of one that a link leads to.

    Raises:
        OSError: it is something else, which opening could block on, or is not there.
    """
    return _check(os.stat(path), path)


def _check(status: os.stat_result, path: str | pathlib.Path) -> os.stat_result:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(status)}, expected a file", str(path))
    return status


def kind_of(status: os.stat_result) -> str:
    """Return what something is that is neither a file nor a folder."""
    return next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "no file")


def open_regular(path: str | pathlib.Path) -> io.BufferedReader:
    """Open a regular file for reading; never wait for a pipe's other end.

    Raises:
        OSError: it is something else, or it cannot be opened.
    """
    check_regular(path)  # a device may act on being opened
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb")  # noqa: SIM115 (the caller's)
    try:
        _check(os.fstat(file.fileno()), path)  # another may have taken its place
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | pathlib.Path, limit: int = TEXT_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: see `open_regular`; or it has more bytes than `limit`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        got = f"{max(size, len(content)):,} bytes, expected at most {limit:,}"
        raise OSError(errno.EFBIG, f"it has {got}", str(path))
    return content
