"""What machine this is, for the record."""

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


def _find(path: str, pattern: str) -> str | None:
    """Return the part that a pattern finds in a file of the system; None: it has no such file."""
    with contextlib.suppress(OSError):
        if found := re.search(pattern, pathlib.Path(path).read_text()):
            return found[1]
    return None
