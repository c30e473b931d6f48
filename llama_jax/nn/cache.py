"""KVCache: keys and values of every layer as an explicit pytree with static capacity.

Position p of a slot holds the key and value of the token at absolute position p; nothing is ever
shifted. Programs donate the cache, so XLA writes it in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt16

from llama_jax.config import ModelConfig

CacheArray = Float[Array, "slots K S H"] | UInt16[Array, "slots K S H"]
"""Keys or values: floats, or the bits of bfloat16 (see `init_cache`)."""


class LayerCache(NamedTuple):
    """One layer's keys and values, apart: one array for both would be sliced and copied."""

    k: CacheArray
    v: CacheArray


KVCache = tuple[LayerCache, ...]
"""One LayerCache per layer: stacked layers would be copied whole at each update."""


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """Return an empty cache of `capacity` positions for each of `batch` slots.

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
    slots: Int[Array, "b"] | None,
) -> LayerCache:
    """Store T tokens from position `starts[i]` on in slot `slots[i]`; None: every slot, in order.

    Positions `starts` to `starts + T - 1` must exist: XLA would move an update that does not fit.
    """
    return LayerCache(
        k=_write(cache.k, _to_cache(k, cache.k.dtype), starts, slots),
        v=_write(cache.v, _to_cache(v, cache.v.dtype), starts, slots),
    )


def copy_slot(cache: KVCache, source: Int[Array, ""], target: Int[Array, ""]) -> KVCache:
    """Copy one slot's keys and values to another, in every layer."""

    def copy(array: Array) -> Array:
        slot = lax.dynamic_slice_in_dim(array, source, 1)
        return lax.dynamic_update_slice_in_dim(array, slot, target, 0)

    return jax.tree.map(copy, cache)


def clear_slot(cache: KVCache, slot: Int[Array, ""]) -> KVCache:
    """Set one slot's keys and values to zero, in every layer."""
    return jax.tree.map(lambda array: array.at[slot].set(0), cache)


def _to_cache(new: Float[Array, "b T K H"], dtype: DTypeLike) -> Shaped[Array, "b K T H"]:
    new = jnp.swapaxes(new, 1, 2)
    if dtype != jnp.uint16:
        return new.astype(dtype)
    return lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)


def _write(
    array: CacheArray,
    new: Shaped[Array, "b K T H"],
    starts: Int[Array, "b"],
    slots: Int[Array, "b"] | None,
) -> CacheArray:
    if new.shape[0] == 1:
        first = jnp.zeros((), starts.dtype) if slots is None else slots[0].astype(starts.dtype)
        return lax.dynamic_update_slice(array, new, (first, 0, starts[0], 0))
    if slots is not None:
        positions = starts[:, None] + jnp.arange(new.shape[2], dtype=starts.dtype)[None, :]
        by_token = jnp.swapaxes(new, 1, 2)  # NumPy's indexing by slots and positions expects this
        return array.at[slots[:, None], :, positions].set(by_token, unique_indices=True)

    def write_slot(old: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice(old, part, (0, start, 0))

    return jax.vmap(write_slot)(array, new, starts)
