"""Host: this machine's memory, or that of the container that the process is in, and its CPU."""

import contextlib
import os
import pathlib
import re

_GROUPS = pathlib.Path("/sys/fs/cgroup")
_CONTROL_GROUPS = (
    ("memory.max", "memory.stat", r"^anon (\d+)$"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", r"^total_rss (\d+)$"),
)
"""Of a container, by version 2 and 1: its limit, and what its processes hold but could not drop."""


_VECTORS = {
    *("sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq"),
    *("avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "sve2"),
}
"""Instructions, as Linux names them, for which XLA compiles sums otherwise."""


def vector_instructions() -> list[str] | None:
    """Return which instructions for vectors the CPU has; None: the system does not tell."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text("utf-8")
        if found := re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE):
            return sorted(_VECTORS.intersection(found[1].split()))
    return None


def total_memory() -> int | None:
    """Return the bytes that there are, whoever uses them; None: the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not POSIX
        return None
    return min([total, *(limit for limit, _ in _containers())])


def free_memory() -> int | None:
    """Return the bytes that processes may still take; None: the system does not tell."""
    free = _find(pathlib.Path("/proc/meminfo"), r"^MemAvailable:\s*(\d+) kB$")
    rooms = [] if free is None else [free * 1024]
    rooms += [max(0, limit - held) for limit, held in _containers()]
    return min(rooms, default=None)


def _containers() -> list[tuple[int, int]]:
    """Return the limit of each container that has one, and what is held of it."""
    found = []
    for limit_file, held_file, pattern in _CONTROL_GROUPS:
        limit = _find(_GROUPS / limit_file, r"^(\d+)$")
        if limit is not None:
            found.append((limit, _find(_GROUPS / held_file, pattern) or 0))
    return found


def _find(path: pathlib.Path, pattern: str) -> int | None:
    """Return the number that a pattern finds in a file of the system; None: there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(pattern, path.read_text("ascii"), re.MULTILINE):
            return int(found[1])
    return None
