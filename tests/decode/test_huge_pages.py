"""Weights in huge pages: in place, the same, and never a reason to fail."""

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


def test_what_is_moved_stays_in_place_and_the_same():
    expected = np.arange(5 * PAGE // 4, dtype=np.float32)
    array = jnp.asarray(expected) + 0
    address = array.unsafe_buffer_pointer()
    moved = use_huge_pages([array, jnp.zeros(3)])
    if not moved:
        pytest.skip("this kernel has no huge pages to give (MADV_COLLAPSE, Linux 6.1)")
    assert moved in (4 * PAGE, 5 * PAGE)
    assert bytes_in_huge_pages(address + PAGE) >= moved
    assert array.unsafe_buffer_pointer() == address
    assert np.array_equal(array, expected)


@pytest.mark.parametrize("reason", ["another system", "an older kernel"])
def test_without_huge_pages_nothing_changes(monkeypatch, reason):
    array = jnp.ones(PAGE, jnp.float32)
    if reason == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(huge_pages, "_COLLAPSE", 9999)
    assert use_huge_pages([array]) == 0
    assert jax.device_get(array).min() == 1
