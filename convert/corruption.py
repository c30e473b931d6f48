"""Describe a corrupted file of weights, with a remedy."""

import pathlib
from collections.abc import Iterable

from llama_jax.errors import InputError
from llama_jax.regular_file import open_regular

_LISTED = 8  # of many names, an error shows these


def corrupted(path: pathlib.Path, kind: str) -> InputError:
    """Return the error for a file that its reader refused; it describes the content."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        return InputError(
            f"{path}: cannot read it ({error.strerror}); check the path and its permissions"
        )
    if not start:
        return InputError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        return InputError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if start.lstrip().startswith(b"<"):
        return InputError(
            f"{path} is an HTML page, not weights: the download link expired or wanted a login; "
            "download it again"
        )
    return InputError(
        f"{path} is no {kind} or is cut short ({size:,} bytes, starts with {start[:8]!r}); "
        "download it again"
    )


def abbreviate(items: Iterable[str]) -> str:
    """Join the first few items and count the rest."""
    items = list(items)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
