"""Chunks: the pieces of an array on the disk, each of which lies in one device's part.

A reader takes whole chunks. Orbax writes an array as one, or cuts it by divisors of whatever axis
is longest, without regard to devices. Here an array is halved along the axis by which a model is
split, as devices halve it.
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

CHUNK_BYTES = 2**20
"""A chunk has no more, where halving an even size allows it. So 7B's smallest weight that is split
has a chunk for each of 32 devices."""

_MIN_COLUMNS = 128
"""A chunk of fewer columns would be copied in pieces of less than 256 bytes."""


class WriteError(OSError):
    """TensorStore could not write an array."""


def chunk_shape(shape: tuple[int, ...], itemsize: int, axis: int | None) -> tuple[int, ...]:
    """Return the shape of an array's chunks.

    Each lies in one device's part, for as many devices as there are chunks along the axis, if that
    is a power of two, and for its divisors.

    Args:
        shape: of the array.
        itemsize: bytes of an element.
        axis: along which devices split it; None: each holds it whole, and it is one chunk.
    """
    chunk = list(shape)
    if axis is None:
        return shape
    if axis == 1:  # a device's columns are few of every row: these are cut first
        while chunk[1] % 2 == 0 and chunk[1] // 2 >= _MIN_COLUMNS:
            chunk[1] //= 2
    while chunk[0] % 2 == 0 and math.prod(chunk) * itemsize > CHUNK_BYTES:
        chunk[0] //= 2
    return tuple(chunk)


class ChunkedHandler(type_handlers.NumpyHandler):
    """Writes each NumPy array in chunks along the axis that its `SaveArgs.shard_axes` names.

    Orbax itself would cut that axis into single rows.
    """

    async def serialize(
        self,
        values: Sequence[np.ndarray],
        infos: Sequence[Any],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        """Write arrays, and wait for it: no future is left."""
        await asyncio.gather(*map(_write, values, infos, args or [ocp.SaveArgs()] * len(values)))
        return []


async def _write(value: np.ndarray, info: Any, args: ocp.SaveArgs) -> None:
    await info.await_path_creation()
    axis = args.shard_axes[0] if args.shard_axes else None
    spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=value.shape,
        local_shape=chunk_shape(value.shape, value.itemsize, axis),
        dtype=value.dtype,
        process_index=0,
    )
    try:
        store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
        await store.write(value, can_reference_source_data_indefinitely=True)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        raise WriteError(str(error)) from error
