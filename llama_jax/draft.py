"""Draft: a folder that is written beside its place and is either whole there or absent."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import InputError


def check_absent(path: str | pathlib.Path) -> None:
    """Refuse to write over what exists."""
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; remove it or name another folder")


@contextlib.contextmanager
def draft(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Make a folder that is renamed to `path` once the block has filled it, and else removed.

    It lies beside `path` under one name: what a killed process left, the next one removes.

    Raises:
        InputError: `path` exists, or another process is writing it.
        OSError: it cannot be made.
    """
    path = pathlib.Path(path).absolute()
    check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    partial.mkdir(exist_ok=True)
    with (partial / "lock").open("w") as lock:
        _lock(lock, path)
        folder = partial / path.name
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
            yield folder
            for file in [*folder.rglob("*"), folder]:
                _sync(file)
            check_absent(path)
            folder.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _lock(file: Any, path: pathlib.Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two writers of one folder are not told apart
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up when this process ends
    except BlockingIOError:
        raise InputError(
            f"{path} is being written by another process; wait for it, or name another folder"
        ) from None


def _sync(path: pathlib.Path) -> None:
    """Wait until a file or folder is on the disk: the rename must not get there first."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
