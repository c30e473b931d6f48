"""Source: the folder of the checkpoint that is to be loaded."""

import os
import pathlib

from jax.typing import DTypeLike

from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.weights.dtypes import choose_dtype
from llama_jax.weights.unconverted import checkpoint_folder

CHECKPOINT_VARIABLE = "LLAMA_JAX_CHECKPOINT"


def default_checkpoint() -> pathlib.Path:
    """Return $LLAMA_JAX_CHECKPOINT if it is set, else the embedded demo model's folder."""
    return pathlib.Path(os.environ.get(CHECKPOINT_VARIABLE) or DEMO_CHECKPOINT)


def find_checkpoint(
    path: str | pathlib.Path | None,
    dtype: DTypeLike | None,
    *,
    convert: bool,
    progress: bool,
) -> pathlib.Path:
    """Return the folder of a checkpoint.

    Args:
        path: its own, or with `convert` that of its source; None: `default_checkpoint()`.
        dtype: to convert to.
        convert: convert a source once, into the user's cache.
        progress: show a bar on stderr meanwhile.

    Raises:
        InputError: it is of another format, or cannot be converted.
    """
    path = default_checkpoint() if path is None else path
    return checkpoint_folder(_converted(path, dtype, progress) if convert else path)


def _converted(path: str | pathlib.Path, dtype: DTypeLike | None, progress: bool) -> pathlib.Path:
    """Return the checkpoint of a source: the one place where the package uses the converters."""
    from convert import cached  # above this package: only for those who ask for it

    name = None if dtype is None else choose_dtype(dtype, "")
    return cached.converted(path, name, progress=progress)
