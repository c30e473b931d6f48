"""The mathematics of a Llama layer: pure functions of arrays and scalars, never of a config.

Letters: B batch, T query length, S cache positions, D model width, N query heads, K key/value
heads, G = N // K, H head dim. Everything is computed in float32 except, where noted, the operands
of products; those accumulate in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt16

from llama_jax.nn import cpu_kernels
from llama_jax.nn.quantized import Quantized

Linears = Callable[..., list[Array]]


def as_float(array: Float[Array, "..."] | UInt16[Array, "..."]) -> Float[Array, "..."]:
    """Return floats as they are, and bits of bfloat16 as bfloat16."""
    return array if array.dtype != jnp.uint16 else lax.bitcast_convert_type(array, jnp.bfloat16)


def embed(tokens: Int[Array, "B T"], table: Float[Array, "V D"]) -> Float[Array, "B T D"]:
    """Look up each token's embedding, in float32."""
    if table.dtype != jnp.bfloat16:
        return table[tokens].astype(jnp.float32)
    # What keeps XLA on a CPU from a copy of the whole table makes one on a TPU.
    look_up = lax.platform_dependent(tokens, table, cpu=_look_up_bits, default=_look_up)
    return look_up.astype(jnp.float32)


def _look_up(tokens: Int[Array, "B T"], table: Float[Array, "V D"]) -> Float[Array, "B T D"]:
    return table[tokens]


def _look_up_bits(tokens: Int[Array, "B T"], table: Float[Array, "V D"]) -> Float[Array, "B T D"]:
    # As bits, since XLA on a CPU would first widen the whole table; and tied to the tokens, since
    # it would copy the bits of the whole table to take that out of the token loop.
    table, tokens = lax.optimization_barrier((table, tokens))
    return as_float(lax.bitcast_convert_type(table, jnp.uint16)[tokens])


def rms_norm(
    x: Float[Array, "B T D"], weight: Float[Array, "D"], eps: float
) -> Float[Array, "B T D"]:
    """Scale vectors to unit root mean square, then by `weight`, in float32 (arXiv:1910.07467)."""
    scale = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)[None, None, :]


NORM_IMPLEMENTATIONS = {"plain": rms_norm, "native": cpu_kernels.rms_norm}
"""By name; `plan.py` chooses."""


def rope_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, factor: float = 1.0
) -> Float[Array, "B T half"]:
    """Return position / factor * theta^(-2i / head_dim) in radians, for i in [0, head_dim / 2)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = jnp.asarray(theta**-exponents / factor, dtype=jnp.float32)
    return positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which queries and keys are rotated."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def make_rotation(angles: Float[Array, "B T half"]) -> Rotation:
    """Return the rotation by angles in radians."""
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def apply_rope(
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *xs: Float[Array, "B T _ H"],
) -> list[Array]:
    """Rotate each pair (x[i], x[i + H/2]) by angle i (arXiv:2104.09864, split-half layout).

    Meta's checkpoints pair (x[2i], x[2i + 1]); conversion permutes their query and key rows.

    Args:
        cos, sin: of the angles, for all heads.
        xs: queries, keys.
    """
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    pairs = [jnp.split(x, 2, axis=-1) for x in xs]
    return [
        jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        for first, second in pairs
    ]


ROPE_IMPLEMENTATIONS = {"plain": apply_rope, "native": cpu_kernels.apply_rope}
"""By name; `plan.py` chooses."""


def swiglu(
    x: Float[Array, "B T D"],
    gate: Float[Array, "part D"] | Quantized,
    up: Float[Array, "part D"] | Quantized,
    down: Float[Array, "outputs F"] | Quantized,
    linears: Linears,
    gather: Callable[[Array], Array],
    *,
    to_float16: bool,
) -> Float[Array, "B T outputs"]:
    """Return down(silu(gate(x)) * up(x)) (arXiv:2002.05202) in float32.

    The product can exceed float16's 65,504 (Llama-2-7B does so at layer 30 on some prompts). Where
    it is rounded to that, it is first brought into range by a power of two per token, which is
    exact, and back after `down`.

    Args:
        x: normalised activations.
        gate, up, down: weights, [outputs, inputs], or one device's part of their outputs.
        linears: multiplies the same activations by several weights; one of
            `projection.IMPLEMENTATIONS`.
        gather: returns the whole of what `gate` and `up` give a part of; see `Shards.gather`.
        to_float16: whether it rounds them to float16; see `projection.rounds_to_float16`.
    """
    gated, upped = linears(x, gate, up)
    hidden = gather(jax.nn.silu(gated) * upped)
    if not to_float16:
        (out,) = linears(hidden, down)
        return out
    _, exponent = jnp.frexp(jnp.max(jnp.abs(hidden), axis=-1, keepdims=True))
    shift = jnp.maximum(exponent - 15, 0)  # hidden < 2**15 after the shift
    (out,) = linears(jnp.ldexp(hidden, -shift), down)
    return jnp.ldexp(out, shift)
