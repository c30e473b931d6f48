"""Projections: activations times a weight stored as published, [outputs, inputs]; float32 out.

Four implementations of the same function; each adds in its own order, and `plan.py` chooses.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from llama_jax.nn import cpu_kernels
from llama_jax.nn.quantized import Quantized

BLOCK_BYTES = 2**21
"""Bytes of a block of weights widened to float32: it stays in a core's cache."""


def plain(
    x: Float[Array, "*batch i"], weight: Float[Array, "o i"] | Quantized
) -> Float[Array, "*batch o"]:
    """Multiply by XLA's own product: on a GPU or TPU, and of float32 weights anywhere.

    There XLA widens int8 numbers to the run's dtype as it reads them.
    """
    if isinstance(weight, Quantized):
        return scaled(plain(x, weight.values.astype(weight.dtype)), weight)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    # float32 means float32: by default a GPU or TPU would round the operands (TF32, bfloat16).
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return lax.dot_general(
        x.astype(weight.dtype),
        weight,
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def two_rows(
    x: Float[Array, "*batch i"], weight: Float[Array, "o i"] | Quantized
) -> Float[Array, "*batch o"]:
    """Multiply two rows at least: XLA on a CPU has a fast bfloat16 product, but not of one row."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        rows = jnp.concatenate([rows, rows])
    out = plain(rows, weight)[: x.size // x.shape[-1]]
    return out.reshape(*x.shape[:-1], weight.shape[0])


def blocked(
    x: Float[Array, "*batch i"], weight: Float[Array, "o i"] | Quantized
) -> Float[Array, "*batch o"]:
    """Multiply block by block of outputs, each widened to float32 in the cache.

    For float16 and int8 on a CPU, where XLA's own product widens the whole weight, or, from
    within the token loop, all the model's weights before the loop.
    """
    if isinstance(weight, Quantized):
        return scaled(_blocked(x, weight.values), weight)
    return _blocked(x, weight)


def _blocked(x: Float[Array, "*batch i"], weight: Num[Array, "o i"]) -> Float[Array, "*batch o"]:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    outputs, inputs = weight.shape
    # Four blocks at least: a short loop would be unrolled, and its widening moved out of others.
    block = max(1, min(outputs // 4, BLOCK_BYTES // (4 * inputs)))

    def multiply(i: Array, y: Array) -> Array:
        # The last block starts early, so as to end where the weight does.
        start = jnp.minimum(i * block, outputs - block)
        part = lax.dynamic_slice(weight, (start, 0), (block, inputs))
        return lax.dynamic_update_slice(y, plain(rows, part.astype(jnp.float32)), (0, start))

    y = jnp.zeros((rows.shape[0], outputs), jnp.float32)
    y = lax.fori_loop(0, -(-outputs // block), multiply, y)
    return y.reshape(*x.shape[:-1], outputs)


def scaled(y: Float[Array, "*batch o"], weight: Quantized) -> Float[Array, "*batch o"]:
    """Multiply the sums of each output by its scale."""
    return y * jnp.expand_dims(weight.scale, tuple(range(y.ndim - 1)))


def _one_by_one(multiply: Callable[[Array, Any], Array]) -> Callable[..., list[Array]]:
    return lambda x, *weights: [multiply(x, weight) for weight in weights]


def rounds_to_float16(implementation: str, weight: Float[Array, "o i"] | Quantized) -> bool:
    """Return whether an implementation rounds x to float16, whose largest value is 65,504."""
    return weight.dtype == jnp.float16 and implementation not in ("native", "blocked")


IMPLEMENTATIONS: dict[str, Callable[..., list[Array]]] = {
    "native": cpu_kernels.linears,
    **{f.__name__: _one_by_one(f) for f in (plain, two_rows, blocked)},
}
"""By name: each multiplies the same activations by several weights, and returns a list."""
