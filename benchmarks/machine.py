"""What machine this is: for the record, and to know what fits into its memory."""

import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "llama-cpp-python", "httpx")


def describe() -> dict[str, Any]:
    """Return the processor, cores, memory and versions; None for a package that is not there."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": _meminfo("MemTotal"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    """Return the processor's model, as far as the system tells."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return the cores that this process may run on: the threads that every engine gets."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes that processes may still take, within a container's limit too.

    None where the system does not tell: then everything is taken to fit.
    """
    free = _meminfo("MemAvailable")
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    left = limit - used + (int(cached[1]) if cached else 0)
    return left if free is None else min(free, left)


def _meminfo(name: str) -> int | None:
    meminfo = pathlib.Path("/proc/meminfo")
    found = meminfo.exists() and re.search(rf"{name}:\s*(\d+) kB", meminfo.read_text())
    return int(found[1]) * 1024 if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
