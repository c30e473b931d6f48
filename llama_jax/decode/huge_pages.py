"""Huge pages: weights in pages of 2 MB, which a CPU finds faster than small ones."""

import ctypes
import sys
from collections.abc import Iterable

import jax

PAGE = 2**21
"""Bytes, where small pages have 4 KB."""

_COLLAPSE = 25
"""Linux's MADV_COLLAPSE (6.1): copy a range into huge pages now, whatever the system's default."""


def use_huge_pages(arrays: Iterable[jax.Array]) -> int:
    """Move what arrays have in a CPU's memory into huge pages, where Linux can.

    Their content and addresses stay. Where it cannot (an older kernel, memory in pieces), the pages
    stay as they are.

    Returns:
        The bytes that are in huge pages now.
    """
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    moved = 0
    for array in arrays:
        for shard in array.addressable_shards:
            if shard.device.platform == "cpu":
                address = shard.data.unsafe_buffer_pointer()
                begin = -(-address // PAGE) * PAGE
                end = (address + shard.data.nbytes) // PAGE * PAGE
                if begin < end and madvise(begin, end - begin, _COLLAPSE) == 0:
                    moved += end - begin
    return moved
