"""The mathematics of a Llama layer: pure functions of arrays and scalars, never of a config.

Letters: B batch, T query length, S cache slots, D model width, N query heads, K key/value heads,
G = N // K, H head dim. Everything is computed in float32 except the operands of matrix products,
which have the weights' dtype; the products accumulate in float32.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

ATTENTION_BLOCK = 256
"""Cache slots whose weighted values are summed in one matrix product.

Partial sums are added block by block in order of position, so a longer bucket of the cache adds
exact zeros at the end and a token's bits do not depend on the bucket it was computed in.
"""

_MASKED = -1e30  # finite: a row of nothing but masked slots stays free of NaN


def linear(x: Float[Array, "*batch i"], weight: Float[Array, "o i"]) -> Float[Array, "*batch o"]:
    """Multiply by a weight stored as published, one row per output; returns float32."""
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


def rms_norm(
    x: Float[Array, "B T D"], weight: Float[Array, "D"], eps: float
) -> Float[Array, "B T D"]:
    """Scale vectors to unit root mean square, then by `weight`, in float32 (arXiv:1910.07467)."""
    scale = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)[None, None, :]


def rope_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> Float[Array, "B T half"]:
    """Return position * theta^(-2i / head_dim) in radians, for i in [0, head_dim / 2)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = jnp.asarray(theta**-exponents, dtype=jnp.float32)
    return positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]


def apply_rope(
    x: Float[Array, "B T heads H"], angles: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotate each pair (x[i], x[i + H/2]) by angle i (arXiv:2104.09864, split-half layout).

    Meta's checkpoints pair (x[2i], x[2i + 1]); conversion permutes their query and key rows.
    """
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attend causally over a cache: the query at position p sees slots 0 to p, and no other.

    Slots above p may hold anything finite. S is at most `ATTENTION_BLOCK` or a multiple of it.
    Softmax and sums are float32; returns float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    block = min(slots, ATTENTION_BLOCK)
    assert slots % block == 0, (slots, block)
    dot = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if k.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    scores = dot("btkgh,bksh->bkgts", q.astype(k.dtype), k)
    visible = jnp.arange(slots)[None, None, :] <= positions[:, :, None]
    scores = jnp.where(visible[:, None, None, :, :], scores, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))

    weights = weights.reshape(*weights.shape[:-1], slots // block, block)
    blocks = v.reshape(batch, kv_heads, slots // block, block, head_dim)
    values = _sum_in_order(dot("bkgtcs,bkcsh->cbtkgh", weights.astype(v.dtype), blocks))
    totals = _sum_in_order(jnp.einsum("bkgtcs->cbtkg", weights))
    return (values / totals[..., None]).reshape(batch, length, heads, head_dim)


def _sum_in_order(blocks: Float[Array, "c *rest"]) -> Float[Array, "*rest"]:
    """Add blocks one after the other: unlike a reduction, zeros at the end change no bit."""
    return functools.reduce(operator.add, blocks)


def swiglu(
    x: Float[Array, "B T D"],
    gate: Float[Array, "F D"],
    up: Float[Array, "F D"],
    down: Float[Array, "D F"],
) -> Float[Array, "B T D"]:
    """Return down(silu(gate(x)) * up(x)) (arXiv:2002.05202) in float32.

    The product can exceed float16's 65,504 (Llama-2-7B does so at layer 30 on some prompts). It is
    then brought into range by a power of two per token, which is exact, and back after `down`.
    """
    hidden = jax.nn.silu(linear(x, gate)) * linear(x, up)
    if down.dtype != jnp.float16:
        return linear(hidden, down)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(hidden), axis=-1, keepdims=True))
    shift = jnp.maximum(exponent - 15, 0)  # hidden < 2**15 after the shift
    return jnp.ldexp(linear(jnp.ldexp(hidden, -shift), down), shift)
