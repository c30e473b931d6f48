"""Files of tensors: safetensors, and PyTorch's pickles, whose code is never run.

A file is opened anew for each tensor: an open file stays mapped, and its pages count as memory.
"""

import dataclasses
import functools
import pathlib
import pickle
import re
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.corruption import abbreviate, corrupted
from llama_jax.errors import InputError, innermost_package
from llama_jax.regular_file import TEXT_BYTES, open_regular

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
        _check_safetensors(path)
        with _open_safetensors(path) as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            dtypes = {name: str(view.get_dtype()) for name, view in views.items()}
            return {
                name: Header(tuple(view.get_shape()), _DTYPES.get(dtypes[name], dtypes[name]))
                for name, view in views.items()
            }
    _check_torch(path)
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


def _check_safetensors(path: pathlib.Path) -> None:
    """Refuse a header that would take more memory than those of any Llama together."""
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError:
        raise corrupted(path, "safetensors file") from None
    if TEXT_BYTES < size < path.stat().st_size:
        raise InputError(
            f"{path} has a header of {size:,} bytes, expected at most {TEXT_BYTES:,}; download it "
            "again"
        )


def _check_torch(path: pathlib.Path) -> None:
    """Refuse an archive whose pickle is large, or whose parts have more bytes than the file.

    PyTorch writes parts as they are; a compressed one could become any number of bytes.
    """
    try:
        with open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                return  # of before 1.6, or corrupted: the reader describes it
            parts = zipfile.ZipFile(file).infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        raise corrupted(path, "PyTorch file") from None
    pickles = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if pickles > TEXT_BYTES or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise InputError(
            f"{path} has compressed parts, or a pickle of {pickles:,} bytes, expected at most "
            f"{TEXT_BYTES:,} and none compressed; save it again with torch.save"
        )


def _open_safetensors(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError):
        raise corrupted(path, "safetensors file") from None


def _load_torch(path: pathlib.Path) -> dict[str, Any]:
    """Return a pickle's tensors by name, mapped from disk and not yet read."""
    if _is_bare_pickle(path):
        return _load_old(path)
    return _state_dict(path, _unpickle(path, mmap=True))


@functools.lru_cache(maxsize=1)
def _load_old(path: pathlib.Path) -> dict[str, Any]:
    """Load a file of PyTorch before 1.6, which cannot be mapped: the last one stays in memory."""
    return _state_dict(path, _unpickle(path, mmap=False))


def _is_bare_pickle(path: pathlib.Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(2) == b"\x80\x02"
    except OSError:  # the reader describes it
        return False


def _unpickle(path: pathlib.Path, *, mmap: bool) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"reading {path.suffix} files needs PyTorch; install the convert extra: "
            "pip install 'llama_jax[convert]'"
        ) from None
    try:
        return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise InputError(
            f"{path} holds Python objects other than tensors{what}, or a corrupted pickle; nothing "
            "in it was run; save the state dict alone, or download it again"
        ) from None
    except Exception as error:  # corrupted bytes: RuntimeError, KeyError, EOFError, ValueError, ...
        if innermost_package(error) != "torch":
            raise
        raise corrupted(path, "PyTorch file") from None


def _state_dict(path: pathlib.Path, loaded: Any) -> dict[str, Any]:
    """Return the one dict of tensors in what a training program saved, checked."""
    import torch

    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, expected a dict of tensors")
    nested = {name: value for name, value in loaded.items() if _holds_embedding(value)}
    if len(nested) > 1:
        raise InputError(
            f"{path} holds several models ({abbreviate(map(repr, nested))}), expected one; save "
            "the state dict of one of them alone"
        )
    tensors = next(iter(nested.values()), loaded)
    size = path.stat().st_size
    unexpected = [
        f"{name!r:.80}"
        for name, tensor in tensors.items()
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"  # meta: a shape without data
        or tensor.nbytes > size  # an expanded one
    ]
    if unexpected:
        raise InputError(
            f"{path}: {abbreviate(unexpected)} is no dense tensor with a name; download it again"
        )
    return tensors


def _holds_embedding(value: Any) -> bool:
    """Whether this is a model's dict of tensors: not an optimizer's, nor a scheduler's."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and name.endswith(("embed_tokens.weight", "tok_embeddings.weight"))
        for name in value
    )
