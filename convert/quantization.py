"""Quantization: of a checkpoint in 16 or 32 bits one whose projections are int8.

docs/checkpoints.md states the law: whoever follows it has the same bytes.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from convert.conversion import check_destination, check_room
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.nn.shapes import SCALE, fixed_dtype
from llama_jax.nn.sharding import weight_bytes
from llama_jax.weights.checkpoint import (
    open_checkpoint,
    read_tensors,
    save_checkpoint,
    tokenizer_path,
)
from llama_jax.weights.shards import Tensor
from llama_jax.weights.unconverted import checkpoint_folder

WEIGHTS = ("int8",)
"""What projections can be quantized to."""

_LARGEST = np.float32(127)
_BLOCK = 2**22  # numbers that are widened to float32 at a time


def quantize(src: pathlib.Path, dst: pathlib.Path, *, progress: bool = False) -> int:
    """Write a checkpoint of the weights of another, its projections as int8: whole, or not there.

    Every tensor is compared with its digest on the way. Some hundred MB are in memory at a time.

    Args:
        src: a checkpoint of one of DTYPES, which embeddings, output layer and norms keep.
        dst: a folder that does not exist yet.
        progress: show a bar on stderr.

    Returns:
        The number of bytes of weights.

    Raises:
        InputError: as `load_checkpoint`; `src` is quantized, or has a number that is none; `dst`
            exists, cannot be made, or its disk has no room.
        OSError: it cannot be written.
    """
    src = checkpoint_folder(src)
    values, config = open_checkpoint(src)
    if config.is_quantized:
        raise InputError(
            f"checkpoint {src} is quantized already, expected float16, bfloat16 or float32; name "
            "the one that it was made of"
        )
    check_destination(dst)
    config = dataclasses.replace(config, quantization="int8")
    size = weight_bytes(config, values["dtype"])
    check_room(dst, size)
    tokenizer = tokenizer_path(src, values)
    save_checkpoint(
        dst,
        _quantized(read_tensors(src, label="quantizing", progress=progress), config),
        config,
        tokenizer=tokenizer and tokenizer.read_bytes(),
        origin={"format": "llama_jax", "root": values["root"], "origin": values["origin"]},
    )
    return size


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 numbers [outputs, inputs] and float32 scales [outputs], by the law.

    Args:
        weight: float16, bfloat16 or float32 [outputs, inputs]; a scale is not finite where its row
            is not.
    """
    values = np.empty(weight.shape, np.int8)
    scale = np.empty(weight.shape[:1], np.float32)
    count = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, len(weight), count):
        rows = slice(begin, begin + count)
        wide = weight[rows].astype(np.float32)
        scale[rows] = np.abs(wide).max(axis=1) / _LARGEST
        if np.isfinite(scale[rows]).all():
            wide /= np.where(scale[rows] == 0, np.float32(1), scale[rows])[:, None]
            values[rows] = np.clip(np.rint(wide), -_LARGEST, _LARGEST)
    return values, scale


def _quantized(tensors: Iterable[Tensor], config: ModelConfig) -> Iterator[Tensor]:
    """Yield tensors, and in place of each projection its numbers and scales."""
    for tensor in tensors:
        if fixed_dtype(tensor.path, config) is None:
            yield tensor
            continue
        values, scale = quantize_weight(tensor.array)
        if not np.isfinite(scale).all():
            raise InputError(
                f"{tensor.path} has NaN or infinity, expected numbers; convert the weights again"
            )
        path = tensor.path
        del tensor  # before the next is read
        yield Tensor(path, values)
        yield Tensor(path + SCALE, scale)
