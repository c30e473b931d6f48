"""Build the CPU kernels of llama_jax/nn/cpu_kernels.cc with GCC or Clang.

Each library is optional. Without a C++ compiler the installation succeeds, and JAX computes the
same products, more slowly in 16 bits. Everything else about the package is in pyproject.toml.
"""

import importlib.util
import os
import pathlib
import platform
import sysconfig

from setuptools import Extension, setup

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
X86_64 = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16, "amx": AMX}
ARM64: dict[str, list[str]] = {"neon": []}  # every compiler for 64-bit ARM takes it for granted
INSTRUCTION_SETS = {"x86_64": X86_64, "amd64": X86_64, "aarch64": ARM64, "arm64": ARM64}
"""For each kind of CPU: the libraries, and what they need of the compiler."""


def machine() -> str:
    """Return the kind of CPU that is built for, which a cross build gives the name of."""
    kind = sysconfig.get_platform().rpartition("-")[2].lower()  # of linux-aarch64
    return platform.machine().lower() if kind == "universal2" else kind


def kernels() -> list[Extension]:
    """Return one library per instruction set; none without jaxlib or for an unknown CPU."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if not (jaxlib and jaxlib.origin):
        return []
    headers = str(pathlib.Path(jaxlib.origin).parent / "include")
    return [
        Extension(
            f"llama_jax.nn._cpu_kernels_{name}",
            sources=["llama_jax/nn/cpu_kernels.cc"],
            depends=["llama_jax/nn/cpu_registers.h", "llama_jax/nn/cpu_tiles.h"],
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++20",
                "-ffp-contract=off",  # products and sums are fused where the source says so, only
                "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 headers
                "-isystem",
                headers,
                *flags,
            ],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.get(machine(), {}).items()
    ]


if sysconfig.get_platform().endswith("universal2"):  # of two kinds of CPU: build for this one
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
setup(ext_modules=kernels())
