"""Paths to weights that are no checkpoint yet: what they are, and how to convert them."""

import pathlib
import re
import shlex

from llama_jax.errors import InputError
from llama_jax.weights.manifest import NAME

_SCHEME = re.compile(r"hf:/+")


def checkpoint_folder(path: str | pathlib.Path) -> pathlib.Path:
    """Return the folder that a path names, absolute.

    Raises:
        InputError: it names a repository of the Hugging Face hub, hf://ORG/NAME.
    """
    if is_repository(path):
        name = f"hf://{_SCHEME.sub('', pathlib.Path(path).as_posix())}"
        raise InputError(
            f"{name} is a repository of the Hugging Face hub, no checkpoint: {_command('hf', name)}"
        )
    return pathlib.Path(path).expanduser().absolute()


def is_repository(path: str | pathlib.Path) -> bool:
    """Tell whether a path is hf://ORG/NAME, of which pathlib makes hf:/ORG/NAME."""
    return _SCHEME.match(pathlib.Path(path).as_posix()) is not None


def published_layout(path: pathlib.Path) -> str | None:
    """Return whose weights a folder holds, as `python -m convert` names them: meta or hf."""
    if not path.is_dir() or (path / NAME).exists():
        return None
    if any(path.glob("consolidated.*.pth")):
        return "meta"
    found = any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    return "hf" if found else None


def _command(layout: str, source: str) -> str:
    return (
        f"run `python -m convert {layout} {shlex.quote(source)} DST` first, or add --convert "
        "(in Python convert=True)"
    )


def remedy(path: pathlib.Path) -> str:
    """Return what to do about a folder that lacks a checkpoint's files."""
    if layout := published_layout(path):
        whose = {"meta": "Meta's", "hf": "Hugging Face's"}[layout]
        return f"these are {whose} weights: {_command(layout, str(path))}"
    if not any(path.iterdir()):
        return "the folder is empty; name the one that convert wrote"
    return "the checkpoint is incomplete; copy or convert it again"
