"""Kernels for CPUs, written in C++ (cpu_kernels.cc) and called through `jax.ffi`.

They are built at installation where there is a compiler (setup.py), and optional: `has_kernels`
says whether this process can use them.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

from llama_jax.jax_settings import pinned_settings
from llama_jax.nn import missing_kernels
from llama_jax.nn.quantized import Quantized

INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "neon")
"""What cpu_kernels.cc is compiled for, best first: x86-64's and that of 64-bit ARM."""

INTERFACE = 4
"""What cpu_kernels.cc must say; both change when the arguments of a kernel do."""

_log = logging.getLogger(__name__)


def linears(x: Float[Array, "*batch i"], *weights: Float[Array, "_ i"] | Quantized) -> list[Array]:
    """Multiply activations by each of several weights, stored as published, [outputs, inputs].

    The bits of an output row depend only on its input row and the weight, not on the batch. Sums
    are of float32; with bfloat16 weights x is rounded to bfloat16 first, with others it is not.

    Args:
        x: the activations.
        weights: of one dtype, or all quantized. One call for all keeps every core busy.

    Returns:
        One float32 array for each weight, as wide as it has outputs.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(jnp.float32)
    outs = [jax.ShapeDtypeStruct((rows.shape[0], w.shape[0]), jnp.float32) for w in weights]
    arrays = [w.values if isinstance(w, Quantized) else w for w in weights]
    scales = [w.scale for w in weights if isinstance(w, Quantized)]
    ys = _call("Linear", outs, rows, *arrays, *scales)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "slots K S H"] | UInt16[Array, "slots K S H"],
    v: Float[Array, "slots K S H"] | UInt16[Array, "slots K S H"],
    positions: Int[Array, "B T"],
    *,
    slots: Int[Array, "B"] | None = None,
    attend_len: int,
) -> Float[Array, "B T N H"]:
    """Attend as `attention.in_blocks`, reading only the positions up to each query's.

    The bits of a query's result depend on its own slot and position alone: not on the batch, the
    other queries, or the cache's size.
    """
    del attend_len  # an upper bound that it does not need
    slots = jnp.arange(q.shape[0]) if slots is None else slots
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    return _call("Attention", out, q, k, v, positions.astype(jnp.int32), slots.astype(jnp.int32))


def rms_norm(
    x: Float[Array, "B T D"], weight: Float[Array, "D"], eps: float
) -> Float[Array, "B T D"]:
    """Normalise as `ops.rms_norm`, but a row's bits depend on nothing but the row."""
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return _call("Norm", out, x, weight, eps=np.float32(eps))


def apply_rope(
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *xs: Float[Array, "B T _ H"],
) -> list[Array]:
    """Rotate as `ops.apply_rope`; XLA would compute cosines and sines anew for each head."""
    outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in xs]
    return _call("Rope", outs, cos, sin, *xs)


def _call(kernel: str, out: Any, *args: Array, **attributes: np.float32) -> Any:
    built_for = _register()
    assert built_for is not None, "no kernel was built for this CPU"
    return jax.ffi.ffi_call(f"llama_jax_{kernel}_{built_for}", out)(*args, **attributes)


@functools.cache
def has_kernels() -> bool:
    """Return whether the kernels were built and run here; tries one on a product of one term."""
    if _register() is None:
        return False
    try:
        with pinned_settings(jax.local_devices(backend="cpu")[0]):
            return bool(linears(jnp.ones((1, 1)), jnp.ones((1, 1)))[0][0, 0] == 1)
    except jax.errors.JaxRuntimeError as error:
        problem = f"the CPU kernels do not run with this jaxlib ({error})"
        _log.warning("%s: %s", problem, missing_kernels.remedy())
        return False


def instruction_set() -> str | None:
    """Return which of INSTRUCTION_SETS the kernels in use are for; None: there are none."""
    return _register() if has_kernels() else None


@functools.cache
def library_digest() -> str | None:
    """Return the SHA-256 of the library in use; None: there is none."""
    if (name := instruction_set()) is None:
        return None
    spec = importlib.util.find_spec(f"llama_jax.nn._cpu_kernels_{name}")
    assert spec is not None
    assert spec.origin is not None
    return hashlib.sha256(pathlib.Path(spec.origin).read_bytes()).hexdigest()


@functools.cache
def _register() -> str | None:
    """Register the best kernels that were built and that this CPU runs; return their name.

    Where there are none, or some are broken, one line says why and what to do.
    """
    chosen, built, problems = None, False, []
    for name in INSTRUCTION_SETS:
        spec = importlib.util.find_spec(f"llama_jax.nn._cpu_kernels_{name}")
        if spec is None or spec.origin is None:
            continue
        built, problem = True, _load(name, spec.origin)
        if problem is None:
            chosen = name
            break
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        remedy = missing_kernels.remedy()
        _log.warning("the CPU kernels cannot be used (%s): %s", "; ".join(problems), remedy)
    elif chosen is None and built:
        _log.warning("%s", missing_kernels.explain_instructions())
    elif chosen is None:
        _log.warning("%s", missing_kernels.explain_absence())
    return chosen


def _load(name: str, path: str) -> str | None:
    """Register the kernels of a library; return what is wrong with it.

    None: nothing is. Empty: this CPU lacks an instruction, which is no fault.
    """
    try:
        library = ctypes.CDLL(path)
        interface = library.LlamaJaxInterface()
        if interface != INTERFACE:
            return f"interface {interface}, expected {INTERFACE}" if interface else ""
        for kernel in ("Linear", "Attention", "Norm", "Rope"):
            handler = jax.ffi.pycapsule(getattr(library, f"LlamaJax{kernel}"))
            jax.ffi.register_ffi_target(f"llama_jax_{kernel}_{name}", handler, platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return str(error)
    return None
