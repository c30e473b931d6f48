"""Memory: what a model takes on its device, and what the device has left."""

import dataclasses

import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.decode.host import free_memory
from llama_jax.decode.plan import Plan, choose_plan
from llama_jax.decode.sizes import Sizes
from llama_jax.errors import InputError
from llama_jax.jax_settings import Device, default_device
from llama_jax.nn.transformer import param_count


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that are held as long as a model is: without the programs' temporary arrays."""

    weights: int
    caches: int
    """Of all slots."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.caches


def needed_memory(config: ModelConfig, plan: Plan, slots: int, context: int) -> Memory:
    """Return the memory that a model takes.

    Args:
        config: its shape.
        plan: how it is held.
        slots: answers at once.
        context: tokens of prompt plus output that each holds.
    """
    positions = slots * Sizes(plan, slots, context).capacity
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions
    return Memory(
        weights=param_count(config) * jnp.dtype(plan.weights).itemsize,
        caches=numbers * jnp.dtype(plan.cache).itemsize,
    )


def available_memory(device: Device) -> int | None:
    """Return the bytes that may still be taken on a device; None: it does not tell.

    Of a GPU or TPU it is what JAX may take (XLA_PYTHON_CLIENT_MEM_FRACTION of a GPU's memory).
    """
    if device.platform == "cpu":
        return free_memory()
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else max(0, limit - stats.get("bytes_in_use", 0))


def check_fits(config: ModelConfig, dtype: str, slots: int, context: int) -> None:
    """Refuse a model that JAX's default device has no room for.

    Args:
        config: its shape.
        dtype: the run's.
        slots, context: see `needed_memory`.

    Raises:
        InputError: with the sum, and what is available.
    """
    device = default_device()
    memory, room = (
        needed_memory(config, choose_plan(config, dtype), slots, context),
        available_memory(device),
    )
    if room is None or memory.total <= room:
        return
    more = "" if device.platform == "cpu" else ", or more of it (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    raise InputError(
        f"the model needs {_size(memory.total)}: {_size(memory.weights)} of weights and "
        f"{_size(memory.caches)} of caches ({slots:,} slots of {context:,} tokens); the "
        f"{device.platform.upper()} has {_size(room)} left; choose fewer slots, a smaller context, "
        f"a 16-bit dtype{more}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
