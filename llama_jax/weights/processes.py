"""Processes: those that load a checkpoint onto one mesh wait for each other, and fail together."""

import contextlib
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.errors import InputError

_FAILED = -1


class OtherProcessError(InputError):
    """Another process failed, and knows why."""


def is_first(mesh: Mesh) -> bool:
    """Return whether this is the first process of a mesh: it alone verifies and shows progress."""
    return jax.process_index() == min(_processes(mesh))


@contextlib.contextmanager
def together(mesh: Mesh) -> Iterator[list[str]]:
    """Wait at the block's end for the other processes of a mesh; where one fails, all do.

    Else the others would go on to a program that needs all of them, and wait there without an end.
    Every process must come here, and exchange nothing with the others within the block.

    Yields:
        a list, to which the block adds what must be equal in all processes.

    Raises:
        OtherProcessError: another process failed.
        InputError: another process added something else.
        Exception: what the block raised in this process.
    """
    equal: list[str] = []
    if len(set(_processes(mesh))) == 1:
        yield equal
        return
    failure = None
    try:
        yield equal
    except Exception as error:
        failure = error
    ours = _FAILED if failure else zlib.crc32("\n".join(equal).encode()) >> 1
    found = dict(zip(_processes(mesh), _exchange(mesh, ours), strict=True))
    if failure:
        raise failure
    if failed := sorted(process for process, value in found.items() if value == _FAILED):
        raise OtherProcessError(
            f"process {failed[0]} could not load the checkpoint; its error says why"
        )
    if others := sorted(process for process, value in found.items() if value != ours):
        raise InputError(
            f"process {others[0]} loads other weights than process {jax.process_index()}, or in "
            "another dtype; give all processes the same checkpoint and flags"
        )


def _processes(mesh: Mesh) -> list[int]:
    """Return the process of each device."""
    return [device.process_index for device in mesh.devices.flat]


def _exchange(mesh: Mesh, value: int) -> list[int]:
    """Return every device's value: that of its process."""
    split = NamedSharding(mesh, P(mesh.axis_names))
    values = jax.make_array_from_callback(
        (mesh.size,), split, lambda _: np.array([value], np.int32)
    )
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    return np.asarray(gather(values)).tolist()
