"""Weights in huge pages: in place, the same, and never a reason to fail."""

import ctypes
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.decode import huge_pages
from llama_jax.decode.huge_pages import PAGE, use_huge_pages


def bytes_in_huge_pages(address: int) -> int:
    """Of the mapping that has this address, as the kernel says."""
    found = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            found = begin <= address < end
        elif found and first == "AnonHugePages:":
            return 1024 * int(rest[0])
    raise AssertionError(f"no mapping at {address:#x}")


def moved(arrays) -> bool:
    """Have arrays moved; return whether there was anything to move."""
    thread = use_huge_pages(arrays)
    if thread is not None:
        thread.join()
    return thread is not None


def refuses(address: int) -> bool:
    """Whether the kernel has no huge page to give for this one."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise(address, PAGE, 25) != 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux moves pages, and says so in /proc")
def test_what_is_moved_stays_in_place_and_the_same():
    expected = np.arange(5 * PAGE // 4, dtype=np.float32)
    array = jnp.asarray(expected) + 0
    address = array.unsafe_buffer_pointer()
    first, size = -(-address // PAGE) * PAGE, 0
    for _ in range(5):  # memory may be in pieces just now
        assert moved([array, jnp.zeros(3)])
        if size := bytes_in_huge_pages(first):
            break
    if not size and refuses(first):
        pytest.skip("this kernel has no huge pages to give (MADV_COLLAPSE, Linux 6.1)")
    assert size >= PAGE
    assert array.unsafe_buffer_pointer() == address
    assert np.array_equal(array, expected)


@pytest.mark.parametrize("reason", ["another system", "an older kernel", "a small array"])
def test_without_huge_pages_nothing_changes(monkeypatch, reason):
    array = jnp.ones(PAGE // 8 if reason == "a small array" else PAGE, jnp.float32)
    if reason == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    if reason == "an older kernel":
        monkeypatch.setattr(huge_pages, "_COLLAPSE", 9999)
    assert moved([array]) == (reason == "an older kernel")
    assert jax.device_get(array).min() == 1


def test_an_array_may_go_before_it_is_moved():
    arrays = [jnp.ones(PAGE, jnp.float32) for _ in range(8)]
    thread = use_huge_pages(arrays)
    assert thread is not None
    arrays.clear()
    thread.join()
    assert jax.device_get(jnp.ones(PAGE, jnp.float32)).min() == 1
