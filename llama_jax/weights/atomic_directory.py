"""Atomic directory: a folder that appears at its path complete, or not at all."""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

from llama_jax.errors import InputError


class BusyError(InputError):
    """Another process is writing the folder."""


def check_absent(path: str | pathlib.Path) -> None:
    """Refuse to write over what exists."""
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; remove it or name another folder")


@contextlib.contextmanager
def atomic_directory(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Make a folder that is renamed to `path` once the block has filled it, and else removed.

    It lies beside `path` under one name: the next process removes what a killed one left.

    Raises:
        InputError: `path` exists.
        BusyError: another process is writing it.
        OSError: it cannot be made.
    """
    path = pathlib.Path(path).absolute()
    check_absent(path)
    partial = partial_folder(path)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, path):
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
            _remove(partial)


def partial_folder(path: pathlib.Path) -> pathlib.Path:
    """Return the temporary folder in which `path` is written."""
    return path.parent / f".{path.name}.partial"


@contextlib.contextmanager
def _locked(partial: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    """Lock the folder for this process; the system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers of one folder are not detected
        yield
        return
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else the other one finished, and removed the folder that is locked here.
            ours = os.path.samestat(os.fstat(descriptor), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise BusyError(
                f"{path} is being written by another process; wait for it, or name another folder"
            )
        yield
    finally:
        os.close(descriptor)


def _remove(partial: pathlib.Path) -> None:
    """Remove the temporary folder, after the threads that still write into it have ended.

    After a write has failed, TensorStore's threads continue with the others, and recreate missing
    folders.
    """
    finished = not any(partial.iterdir())
    shutil.rmtree(partial, ignore_errors=True)
    for pause in () if finished else (0.1, 0.2, 0.4, 0.8):
        time.sleep(pause)
        if not partial.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    """Wait until a file or folder is on the disk: the rename must not get there first."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
