"""Why there are no CPU kernels, and what to do about it."""

import importlib.machinery
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys
import sysconfig
import urllib.parse
from collections.abc import Iterator

_FOLDER = pathlib.Path(__file__).resolve().parent
"""Where the kernels in use lie, if there are any."""

_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
"""Those that setup.py builds kernels for, as systems name them."""


def explain_absence() -> str:
    """Return why no library of kernels lies beside this module, and the remedy, in one line."""
    if (machine := platform.machine().lower()) not in _MACHINES:
        return (
            "the CPU kernels are for x86-64 CPUs with AVX2 and 64-bit ARM CPUs, and this one is "
            f"{machine or 'unknown'}: JAX computes in their place, more slowly; there is "
            "nothing to install"
        )
    root = _FOLDER.parent.parent
    if hidden := next(_folders_with_kernels(), None):
        return (
            f"the CPU kernels are in {hidden.parent.parent}, but this process runs {root}, which "
            f"has none: {remedy()}"
        )
    if compiler := find_compiler():
        return (
            f"the CPU kernels were not built, though there is a C++ compiler ({compiler}): "
            f"{remedy()}; with -v it shows what the compiler says"
        )
    return (
        "the CPU kernels were not built, for there is no C++ compiler: install g++ (apt install "
        f"g++), then {remedy()}"
    )


def explain_instructions() -> str:
    """Return why libraries of kernels that were built do not run on this CPU."""
    return (
        "the CPU kernels are for x86-64 CPUs with AVX2, which this one lacks: JAX computes in "
        "their place, more slowly; there is nothing to install"
    )


def remedy() -> str:
    """Return the command that builds the kernels where this process looks for them."""
    root = _FOLDER.parent.parent
    if (root / "setup.py").is_file():
        return f"run `pip install -e .` in {root}"
    return "install llama_jax again"


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, as setuptools looks for it; None: there is none."""
    named = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    paths = (shutil.which(command.split()[0]) for command in named if command and command.strip())
    return next(filter(None, paths), None)


def _folders_with_kernels() -> Iterator[pathlib.Path]:
    """Yield the folders `llama_jax/nn` of other installations that have kernels for this Python."""
    roots = [pathlib.Path(entry) for entry in sys.path]
    for distribution in importlib.metadata.distributions(name="llama_jax"):
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
        if source.get("dir_info", {}).get("editable"):
            path = urllib.parse.unquote(urllib.parse.urlsplit(source["url"]).path)
            roots.append(pathlib.Path(path))
    for root in roots:
        folder = (root / "llama_jax" / "nn").resolve()
        if folder != _FOLDER and _has_kernels(folder):
            yield folder


def _has_kernels(folder: pathlib.Path) -> bool:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    libraries = folder.glob("_cpu_kernels_*.*")
    return any("." + path.name.partition(".")[2] in suffixes for path in libraries)
