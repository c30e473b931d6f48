"""Attention over a cache: the query at position p sees positions 0 to p, and no other.

Six implementations of the same function; each adds in its own order, and `plan.py` chooses.
Letters as in `ops.py`: B batch, T queries, S cache positions, N query heads, K key/value heads,
G = N // K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama_jax.nn import cpu_kernels, ops
from llama_jax.nn.cache import CacheArray

BLOCK = 128
"""Cache positions that `in_blocks` reads at a time."""

_MASKED = -1e30  # finite: a query whose positions are all masked stays free of NaN

_Softmax = tuple[
    Float[Array, "B K GT"],  # the highest score so far
    Float[Array, "B K GT"],  # the sum of exp(score - highest)
    Float[Array, "B K GT H"],  # the sum of values weighted by it
]


def in_blocks(
    q: Float[Array, "B T N H"],
    k: CacheArray,
    v: CacheArray,
    positions: Int[Array, "B T"],
    *,
    slots: Int[Array, "B"] | None = None,
    attend_len: int,
    widen: bool,
) -> Float[Array, "B T N H"]:
    """Attend causally over a cache: the query at position p sees positions 0 to p, and no other.

    A loop over blocks of positions with a running softmax (arXiv:1805.02867). Each turn has the
    same shapes whatever `attend_len` is, and a wholly masked block adds exact zeros. So reading
    more of the cache changes no bit; one product and one softmax over all of it may. Blocks are cut
    out of the whole cache inside the loop; a slice of the cache would be copied first. A GPU would
    launch several kernels at each turn.

    Args:
        q, k, v: queries, and the cache; positions above a query's may hold anything finite.
        positions: absolute, of each query.
        slots: the slot of k and v that q (then of batch 1) attends to; None: each to its own.
        attend_len: static; cache positions to read, more than any of `positions`, at most S. It is
            at most `BLOCK`, or a multiple of it.
        widen: static; multiply in float32, as a CPU does fastest, and not in the cache's dtype.

    Returns:
        Weighted values in float32.
    """
    batch, length = q.shape[:2]
    block = min(attend_len, BLOCK)
    assert attend_len % block == 0, attend_len
    assert attend_len <= k.shape[2], (attend_len, k.shape)
    q = _group_heads(q, k.shape[1])

    def attend(i: Array, carry: _Softmax) -> _Softmax:
        k_block, v_block = (ops.as_float(_cut(a, slots, batch, i * block, block)) for a in (k, v))
        if widen:
            k_block, v_block = k_block.astype(jnp.float32), v_block.astype(jnp.float32)
        visible = (i * block + jnp.arange(block))[None, None, :] <= positions[:, :, None]
        return _attend_block(carry, q, k_block, v_block, visible)

    shape = q.shape[:-1]
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(q.shape))
    _, total, values = lax.fori_loop(0, attend_len // block, attend, start)
    return _ungroup_heads(values / total[..., None], length)


def _attend_block(
    carry: _Softmax,
    q: Float[Array, "B K GT H"],
    k: Float[Array, "B K block H"],
    v: Float[Array, "B K block H"],
    visible: Bool[Array, "B T block"],
) -> _Softmax:
    """Add one block of positions to a running softmax."""
    highest, total, values = carry
    scores = _mask(_dot("bkqh,bksh->bkqs", q.astype(k.dtype), k), visible)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_highest[..., None])
    fade = jnp.exp(highest - new_highest)
    total = total * fade + jnp.sum(weights, axis=-1)
    block_values = _dot("bkqs,bksh->bkqh", weights.astype(v.dtype), v)
    return new_highest, total, values * fade[..., None] + block_values


def whole(
    q: Float[Array, "B T N H"],
    k: CacheArray,
    v: CacheArray,
    positions: Int[Array, "B T"],
    *,
    slots: Int[Array, "B"] | None = None,
    attend_len: int,
) -> Float[Array, "B T N H"]:
    """Attend as `in_blocks`, by one product over all positions: few, large kernels.

    Products are of the cache's dtype and accumulate in float32. Bits may depend on `attend_len`.
    """
    k, v = (ops.as_float(_cut(a, slots, q.shape[0], 0, attend_len)) for a in (k, v))
    queries = _group_heads(q, k.shape[1]).astype(k.dtype)
    visible = jnp.arange(attend_len)[None, None, :] <= positions[:, :, None]
    scores = _mask(_dot("bkqh,bksh->bkqs", queries, k), visible)
    weights = jax.nn.softmax(scores, axis=-1)
    return _ungroup_heads(_dot("bkqs,bksh->bkqh", weights.astype(v.dtype), v), q.shape[1])


def in_tree(
    q: Float[Array, "B T N H"],
    k: CacheArray,
    v: CacheArray,
    positions: Int[Array, "B T"],
    *,
    slots: Int[Array, "B"] | None = None,
    attend_len: int,
) -> Float[Array, "B T N H"]:
    """Attend as `whole`, with sums over positions in a stated order.

    Blocks of positions are a batch dimension of the products, so that no sum of the compiler's
    crosses one; then they are added by halves. A wholly masked block adds exact zeros: reading more
    of the cache changes no bit.
    """
    k, v = (ops.as_float(_cut(a, slots, q.shape[0], 0, attend_len)) for a in (k, v))
    block = min(attend_len, BLOCK)
    k, v = (a.reshape(*a.shape[:2], -1, block, a.shape[-1]) for a in (k, v))
    queries = _group_heads(q, k.shape[1]).astype(k.dtype)
    queries = jnp.broadcast_to(queries[:, :, None], (*k.shape[:3], *queries.shape[2:]))
    scores = _dot("bknqh,bknsh->bkqns", queries, k)
    visible = jnp.arange(attend_len)[None, None, :] <= positions[:, :, None]
    scores = _mask(scores.reshape(*scores.shape[:3], attend_len), visible)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights.reshape(*weights.shape[:3], -1, block)
    values = _dot("bkqns,bknsh->bkqnh", weights.astype(v.dtype), v)
    # One kernel for each level of sums: all in one would hold a whole head's values in registers.
    values, total = lax.optimization_barrier((values, jnp.sum(weights, axis=-1, keepdims=True)))
    return _ungroup_heads(_sum_by_halves(values) / _sum_by_halves(total), q.shape[1])


def _sum_by_halves(x: Float[Array, "B K q n H"]) -> Float[Array, "B K q H"]:
    """Add the second half of the blocks to the first, and so on; zeros are added to fill up."""
    blocks = 1 << (x.shape[3] - 1).bit_length()
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, blocks - x.shape[3]), (0, 0)))
    while blocks > 1:
        blocks //= 2
        x = x[:, :, :, :blocks] + x[:, :, :, blocks:]
    return x[:, :, :, 0]


def in_rows(
    q: Float[Array, "B T N H"],
    k: CacheArray,
    v: CacheArray,
    positions: Int[Array, "B T"],
    *,
    slots: Int[Array, "B"] | None = None,
    attend_len: int,
) -> Float[Array, "B T N H"]:
    """Attend as `in_blocks`, one sequence after the other.

    XLA on a CPU multiplies a few sequences by other code than many. In the body of a loop each is
    alone, whatever their number.
    """
    assert slots is None, "for all slots, in order"
    batch = q.shape[0]

    def attend(row: Int[Array, ""]) -> Float[Array, "T N H"]:
        row = jnp.minimum(row, batch - 1)
        part, position = (lax.dynamic_slice_in_dim(a, row, 1) for a in (q, positions))
        out = in_blocks(part, k, v, position, slots=row[None], attend_len=attend_len, widen=True)
        return out[0]

    # Two at least: XLA compiles a loop of one turn as no loop.
    return lax.map(attend, jnp.arange(max(2, batch), dtype=positions.dtype))[:batch]


IMPLEMENTATIONS = {
    "rows": in_rows,
    "blocks": functools.partial(in_blocks, widen=True),
    "loop": functools.partial(in_blocks, widen=False),
    "whole": whole,
    "tree": in_tree,
    "native": cpu_kernels.attention,
}
"""By name; `plan.py` chooses."""


def _group_heads(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K GT H"]:
    """Scale queries and group them by the key/value head they share.

    One dimension for group and time: of two, XLA on a GPU transposes all keys of the cache.
    """
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    return jnp.einsum("btkgh->bkgth", q).reshape(batch, kv_heads, -1, head_dim)


def _ungroup_heads(values: Float[Array, "B K GT H"], length: int) -> Float[Array, "B T N H"]:
    batch, kv_heads, _, head_dim = values.shape
    values = jnp.einsum("bkgth->btkgh", values.reshape(batch, kv_heads, -1, length, head_dim))
    return values.reshape(batch, length, -1, head_dim)


def _mask(
    scores: Float[Array, "B K GT S"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B K GT S"]:
    batch, kv_heads, _, positions = scores.shape
    grouped = scores.reshape(batch, kv_heads, -1, visible.shape[1], positions)
    return jnp.where(visible[:, None, None], grouped, _MASKED).reshape(scores.shape)


def _cut(
    array: CacheArray,
    slots: Int[Array, "B"] | None,
    batch: int,
    start: Int[Array, ""] | int,
    length: int,
) -> Array:
    """Return `length` positions from `start` on, of every slot or of the one given."""
    assert slots is None or batch == 1, "only the CPU kernel takes several slots"
    _, kv_heads, _, head_dim = array.shape
    corner = (0 if slots is None else slots[0], 0, start, 0)
    return lax.dynamic_slice(array, corner, (batch, kv_heads, length, head_dim))


def _dot(letters: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiply by `einsum`, in float32 what is float32, and accumulate in float32."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
