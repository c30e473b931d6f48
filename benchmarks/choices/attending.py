"""How a cache is attended to: the project's kernels, and JAX's own function."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.choices.setting import Setting
from benchmarks.choices.trial import CannotRunError, Trial, time_call
from benchmarks.model_cost import ITEM_BYTES, Cost
from benchmarks.weights import filled
from llama_jax.config import ModelConfig
from llama_jax.decode.plan import choose_plan
from llama_jax.nn import attention as attentions
from llama_jax.nn.cpu_kernels import has_kernels

Attend = Callable[[jax.Array, Any, Any], jax.Array]
"""From queries [B, T, N, H], keys and values to what is attended to, of the queries' shape."""


def attention(setting: Setting) -> Iterator[Trial]:
    """Time one layer's attention: of a token, then of a prompt's chunk, over caches of each size.

    JAX's function takes caches as [B, S, K, H], the project's are [B, K, S, H].
    """
    size = setting.size
    limit = setting.config.max_seq_len
    slots = [count for count in size.slots if count <= limit]
    shapes = [(1, 1, count) for count in slots]
    shapes += [(1, length, count) for length in size.queries for count in slots if length <= count]
    shapes += [(batch, 1, count) for batch in size.batches if batch > 1 for count in slots]
    for batch, length, count in shapes:
        for dtype in setting.dtypes:
            kernels = [name for name in attentions.IMPLEMENTATIONS if name != "native"]
            if setting.on_cpu and has_kernels():
                kernels.append("native")
            for form in [*kernels, "jax cudnn", "jax xla"]:
                yield Trial(
                    {"batch": batch, "queries": length, "slots": count, "dtype": dtype},
                    form,
                    functools.partial(_time, setting, form, batch, length, count, dtype),
                    _cost(setting.config, batch, length, count, dtype),
                    dtype,
                    foreign=form.startswith("jax"),
                )


def _cost(config: ModelConfig, batch: int, length: int, slots: int, dtype: str) -> Cost:
    """Return the least work: scores and sums over visible slots, keys and values read once."""
    visible = sum(range(slots - length + 1, slots + 1))
    flops = 4 * batch * visible * config.num_heads * config.head_dim
    read = 2 * batch * slots * config.num_kv_heads * config.head_dim * ITEM_BYTES[dtype]
    return Cost(flops, read + 8 * batch * length * config.num_heads * config.head_dim)


def _time(setting: Setting, form: str, batch: int, length: int, slots: int, dtype: str) -> float:
    """Return the seconds of one layer's attention; several layers' caches take turns."""
    c = setting.config
    foreign = form.startswith("jax")
    held = dtype if foreign else choose_plan(c, dtype).cache
    shape = (batch, slots, c.num_kv_heads, c.head_dim)
    if not foreign:
        shape = (batch, c.num_kv_heads, slots, c.head_dim)
    one = 2 * math.prod(shape) * ITEM_BYTES[dtype]
    layers = max(2, min(math.ceil(setting.size.spread / one), c.num_layers))
    if setting.on_cpu and length > 1:
        layers = 2  # bound by the cores, and slow
    scores = 8 * batch * c.num_heads * length * slots
    need = one * (layers + 1) + scores
    if need > setting.memory() / 2:
        raise CannotRunError(f"needs {need / 1e9:.1f} GB of memory")
    caches = [(_slots(shape, held), _slots(shape, held)) for _ in range(layers)]
    q = filled((batch, length, c.num_heads, c.head_dim), jnp.float32)
    attend = _foreign(form, length, slots, dtype) if foreign else _ours(form, length, slots)

    @jax.jit
    def run(q: jax.Array, caches: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        outs: list[jax.Array] = []
        for k, v in caches:
            # Each waits for the one before, as layers do; else a CPU would run several at once.
            query = q + 1e-30 * outs[-1] if outs else q
            outs.append(attend(query, k, v))
        return outs

    return time_call(lambda: run(q, caches), setting.size.seconds, parts=layers)


def _slots(shape: tuple[int, ...], dtype: str) -> jax.Array:
    if dtype != "uint16":
        return filled(shape, jnp.dtype(dtype))
    return lax.bitcast_convert_type(filled(shape, jnp.dtype("bfloat16")), jnp.uint16)


def _ours(form: str, length: int, slots: int) -> Attend:
    def attend(q: jax.Array, k: Any, v: Any) -> jax.Array:
        positions = jnp.arange(slots - length, slots, dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, q.shape[:2])
        return attentions.IMPLEMENTATIONS[form](q, k, v, positions, attend_len=slots)

    return attend


def _foreign(form: str, length: int, slots: int, dtype: str) -> Attend:
    """Return JAX's function: by lengths for one query, causal for a whole prompt, else by mask."""
    implementation: Any = form.removeprefix("jax ")

    def attend(q: jax.Array, k: Any, v: Any) -> jax.Array:
        how: dict[str, Any] = {"is_causal": True}
        if length == 1:
            how = {"key_value_seq_lengths": jnp.full((q.shape[0],), slots, jnp.int32)}
        elif length < slots:
            visible = jnp.arange(slots)[None] <= jnp.arange(slots - length, slots)[:, None]
            how = {"mask": visible[None, None]}
        out = jax.nn.dot_product_attention(
            q.astype(dtype), k, v, implementation=implementation, **how
        )
        return out.astype(jnp.float32)

    return attend
