"""Huge pages: weights in pages of 2 MB, which a CPU finds faster than small ones."""

import ctypes
import sys
import threading
from collections.abc import Iterable

import jax

PAGE = 2**21
"""Bytes, where small pages have 4 KB."""

_COLLAPSE = 25
"""Linux's MADV_COLLAPSE (6.1): copy a range into huge pages now, whatever the system's default."""


def use_huge_pages(arrays: Iterable[jax.Array]) -> threading.Thread | None:
    """Move what arrays have in a CPU's memory into huge pages, where Linux can, beside other work.

    Their content and addresses stay. Where it cannot (an older kernel, memory in pieces), the pages
    stay as they are.

    Returns:
        The thread that moves them, a GB in about 1.3 s; None: there is nothing to move.
    """
    if sys.platform != "linux":
        return None
    ranges = [
        (begin, end - begin)
        for array in arrays
        for shard in array.addressable_shards
        if shard.device.platform == "cpu"
        for begin, end in [_whole_pages(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)]
        if begin < end
    ]
    if not ranges:
        return None
    # A process need not wait for it to end, nor an array to live as long: whatever is at an address
    # by then keeps its content.
    thread = threading.Thread(target=_move, args=(ranges,), name="huge pages", daemon=True)
    thread.start()
    return thread


def _whole_pages(address: int, size: int) -> tuple[int, int]:
    """Return where the first of a range's whole huge pages begins, and where the last ends."""
    return -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE


def _move(ranges: Iterable[tuple[int, int]]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for address, size in ranges:
        madvise(address, size, _COLLAPSE)  # it says no where it cannot
