"""The mathematics of a Llama layer: pure functions of arrays and scalars, never of a config.

Letters: B batch, T query length, S cache slots, D model width, N query heads, K key/value heads,
G = N // K, H head dim. Everything is computed in float32 except the operands of matrix products,
which have the weights' dtype; the products accumulate in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

ATTENTION_BLOCK = 128
"""Cache slots that attention takes at a time."""

_MASKED = -1e30  # finite: a row of nothing but masked slots stays free of NaN

_Softmax = tuple[
    Float[Array, "B K G T"],  # the highest score so far
    Float[Array, "B K G T"],  # the sum of exp(score - highest)
    Float[Array, "B K G T H"],  # the sum of values weighted by it
]


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
    k: Float[Array, "rows K S H"],
    v: Float[Array, "rows K S H"],
    positions: Int[Array, "B T"],
    *,
    row: Int[Array, ""] | None = None,
    attend_len: int,
) -> Float[Array, "B T N H"]:
    """Attend causally over a cache: the query at position p sees slots 0 to p, and no other.

    A loop over blocks of slots with a running softmax (arXiv:1805.02867). Each turn has the same
    shapes whatever `attend_len` is, and a block that is wholly masked adds exact zeros: so reading
    more of the cache changes no bit, where one product and one softmax over all of it may. Blocks
    are cut out of the whole cache inside the loop: a slice of it would be copied first.

    Args:
        q, k, v: queries, and the cache's slots; those above a query's position may hold anything
            finite.
        positions: absolute, of each query.
        row: the one row of k and v that q (then of batch 1) attends to; None: each to its own.
        attend_len: static; slots to read, more than any position, at most S. It is at most
            `ATTENTION_BLOCK`, or a multiple of it.

    Returns:
        Weighted values in float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group, block = heads // kv_heads, min(attend_len, ATTENTION_BLOCK)
    assert attend_len % block == 0, attend_len
    assert attend_len <= k.shape[2], (attend_len, k.shape)
    q = q.reshape(batch, length, kv_heads, group, head_dim) * head_dim**-0.5
    q = jnp.einsum("btkgh->bkgth", q.astype(k.dtype))

    def attend(i: Array, carry: _Softmax) -> _Softmax:
        corner = (0 if row is None else row, 0, i * block, 0)
        shape = (batch, kv_heads, block, head_dim)
        k_block, v_block = (lax.dynamic_slice(a, corner, shape) for a in (k, v))
        visible = (i * block + jnp.arange(block))[None, None, :] <= positions[:, :, None]
        return _attend_block(carry, q, k_block, v_block, visible)

    shape = (batch, kv_heads, group, length)
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    _, total, values = lax.fori_loop(0, attend_len // block, attend, start)
    out = jnp.einsum("bkgth->btkgh", values / total[..., None])
    return out.reshape(batch, length, heads, head_dim)


def _attend_block(
    carry: _Softmax,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K block H"],
    v: Float[Array, "B K block H"],
    visible: Bool[Array, "B T block"],
) -> _Softmax:
    """Take one block of slots into a running softmax."""
    dot = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if k.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    highest, total, values = carry
    scores = dot("bkgth,bksh->bkgts", q, k)
    scores = jnp.where(visible[:, None, None, :, :], scores, _MASKED)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_highest[..., None])
    fade = jnp.exp(highest - new_highest)
    total = total * fade + jnp.sum(weights, axis=-1)
    block_values = dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    return new_highest, total, values * fade[..., None] + block_values


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
