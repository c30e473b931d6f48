"""KVCache: keys and values of every layer as an explicit pytree with static capacity.

Slot p of a row holds the key and value of the token at absolute position p; nothing is ever
shifted. Executables donate the cache, so XLA writes it in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt16

from llama_jax.config import ModelConfig

Slots = Float[Array, "rows K S H"] | UInt16[Array, "rows K S H"]
"""Keys or values: floats, or the bits of bfloat16 (see `init_cache`)."""


class LayerCache(NamedTuple):
    """One layer's keys and values, apart: one array for both would be sliced and copied."""

    k: Slots
    v: Slots


KVCache = tuple[LayerCache, ...]
"""One LayerCache per layer: stacked layers would be copied whole at each update."""


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """Return an empty cache of `capacity` slots for each of `batch` rows.

    Args:
        config: the model's shape.
        batch, capacity: its size.
        dtype: a float's, or uint16: bfloat16 kept as its bits, since XLA on a CPU widens a
            bfloat16 array whole, and narrows it again, at each write and each cut.
    """
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_layers)
    )


def write(
    cache: LayerCache,
    k: Float[Array, "b T K H"],
    v: Float[Array, "b T K H"],
    starts: Int[Array, "b"],
    rows: Int[Array, "b"] | None,
) -> LayerCache:
    """Store T tokens from slot `starts[i]` on, in row `rows[i]`; None: in every row, in order.

    Slots `starts` to `starts + T - 1` must exist: XLA would move an update that does not fit.
    """
    return LayerCache(
        k=_write(cache.k, _to_slots(k, cache.k.dtype), starts, rows),
        v=_write(cache.v, _to_slots(v, cache.v.dtype), starts, rows),
    )


def copy_row(cache: KVCache, source: Int[Array, ""], target: Int[Array, ""]) -> KVCache:
    """Let one row hold what another does, in every layer."""

    def copy(slots: Array) -> Array:
        row = lax.dynamic_slice_in_dim(slots, source, 1)
        return lax.dynamic_update_slice_in_dim(slots, row, target, 0)

    return jax.tree.map(copy, cache)


def _to_slots(new: Float[Array, "b T K H"], dtype: DTypeLike) -> Shaped[Array, "b K T H"]:
    new = jnp.swapaxes(new, 1, 2)
    if dtype != jnp.uint16:
        return new.astype(dtype)
    return lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)


def _write(
    slots: Slots,
    new: Shaped[Array, "b K T H"],
    starts: Int[Array, "b"],
    rows: Int[Array, "b"] | None,
) -> Slots:
    if new.shape[0] == 1:
        first = jnp.zeros((), starts.dtype) if rows is None else rows[0].astype(starts.dtype)
        return lax.dynamic_update_slice(slots, new, (first, 0, starts[0], 0))
    if rows is not None:
        places = starts[:, None] + jnp.arange(new.shape[2], dtype=starts.dtype)[None, :]
        by_token = jnp.swapaxes(new, 1, 2)  # what NumPy's indexing by rows and places asks for
        return slots.at[rows[:, None], :, places].set(by_token, unique_indices=True)

    def write_row(row_slots: Array, row_new: Array, start: Array) -> Array:
        return lax.dynamic_update_slice(row_slots, row_new, (0, start, 0))

    return jax.vmap(write_row)(slots, new, starts)
