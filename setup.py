"""Build the CPU kernels of llama_jax/nn/cpu_kernels.cc with GCC or Clang.

Each library is optional. Without a C++ compiler the installation succeeds, and JAX computes the
same products, more slowly in 16 bits. Everything else about the package is in pyproject.toml.
"""

import importlib.util
import pathlib
import platform

from setuptools import Extension, setup

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


def kernels() -> list[Extension]:
    """Return one library per instruction set; none without jaxlib or on another CPU than x86-64."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if platform.machine().lower() not in ("x86_64", "amd64") or not (jaxlib and jaxlib.origin):
        return []
    headers = str(pathlib.Path(jaxlib.origin).parent / "include")
    return [
        Extension(
            f"llama_jax.nn._cpu_kernels_{name}",
            sources=["llama_jax/nn/cpu_kernels.cc"],
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
        for name, flags in INSTRUCTION_SETS.items()
    ]


setup(ext_modules=kernels())
