"""Files of tensors: safetensors, and PyTorch's pickles, whose code is never run.

A file is opened anew for each tensor: an open file stays mapped, and its pages count as memory.
"""

import dataclasses
import pathlib
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.corruption import abbreviate, corrupted
from llama_jax.errors import InputError, innermost_package

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Header:
    """A tensor as its file declares it; the data is not read."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(path: pathlib.Path) -> dict[str, Header]:
    """Return what a .safetensors, .bin or .pth file holds.

    Raises:
        InputError: it is corrupted, something else, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            dtypes = {name: str(view.get_dtype()) for name, view in views.items()}
            return {
                name: Header(tuple(view.get_shape()), _DTYPES.get(dtypes[name], dtypes[name]))
                for name, view in views.items()
            }
    return {
        name: Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in _load_torch(path).items()
    }


def read_tensor(path: pathlib.Path, name: str) -> np.ndarray:
    """Read one tensor of a file that `read_headers` has passed."""
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            return file.get_tensor(name)
    import torch

    tensor = _load_torch(path)[name]
    # As bytes, since NumPy has no bfloat16 that PyTorch knows of; copied out of the mapping.
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    return flat.copy().view(dtype).reshape(tensor.shape)


def _open_safetensors(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError):
        raise corrupted(path, "safetensors file") from None


def _load_torch(path: pathlib.Path) -> dict[str, Any]:
    """Return a pickle's tensors by name, mapped from disk and not yet read."""
    try:
        import torch
    except ImportError:
        raise InputError(
            f"reading {path.suffix} files needs PyTorch; install the convert extra: "
            "pip install -e '.[convert]'"
        ) from None
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds Python objects other than tensors, or a corrupted pickle; nothing in it "
            "was run; download it again"
        ) from None
    except Exception as error:  # corrupted bytes: RuntimeError, KeyError, EOFError, ValueError, ...
        if innermost_package(error) != "torch":
            raise
        raise corrupted(path, "PyTorch zip file") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, expected a dict of tensors")
    unexpected = [
        repr(name)
        for name, tensor in loaded.items()
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
        or tensor.layout != torch.strided
    ]
    if unexpected:
        raise InputError(
            f"{path}: {abbreviate(unexpected)} is no dense tensor with a name; download it again"
        )
    return loaded
