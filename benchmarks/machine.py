"""What machine this is: for the record, and to know what fits into its memory."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

PACKAGES = {"jax", "jaxlib", "numpy", "torch", "transformers", "llama_cpp_python", "httpx"}


def describe() -> dict[str, Any]:
    """Return the processor, cores, memory and versions of a record."""
    found = importlib.metadata.distributions()
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {own.name: own.version for own in found if own.name in PACKAGES},
    }


def cpu_name() -> str:
    """Return the processor's model, as far as the system tells."""
    found = _find("/proc/cpuinfo", r"model name\s*:\s*(.+)")
    return found or platform.processor() or platform.machine()


def cores() -> int:
    """Return the cores that this process may run on: the threads that every engine gets."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes that processes may still take, within a container's limit too.

    None where the system does not tell: then everything is taken to fit.
    """
    free = _find("/proc/meminfo", r"MemAvailable:\s*(\d+) kB")
    limits = [int(free) * 1024] if free else []
    with contextlib.suppress(OSError, ValueError):  # no container, or "max": no limit
        limits.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def _find(path: str, pattern: str) -> str | None:
    """Return the part that a pattern finds in a file of the system; None: it has no such file."""
    with contextlib.suppress(OSError):
        if found := re.search(pattern, pathlib.Path(path).read_text()):
            return found[1]
    return None
