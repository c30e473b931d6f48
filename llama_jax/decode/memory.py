"""Memory: what a model takes on its device, and what the device has left."""

import dataclasses
import os

import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.decode.host import free_memory
from llama_jax.decode.plan import Plan
from llama_jax.decode.sizes import Sizes
from llama_jax.errors import InputError
from llama_jax.jax_settings import Device, default_device
from llama_jax.nn.attention import BLOCK
from llama_jax.nn.kernel_choice import KernelChoice
from llama_jax.nn.transformer import param_count

_STATE_BYTES = 9
"""For each token of the vocabulary: bias, count, and whether the prompt has it."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a model needs."""

    weights: int
    caches: int
    """Of all slots."""
    working: int
    """What sampling holds for each slot, and the temporary arrays of the largest program, at most;
    tests/aot compares it with the compilers' sums."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.caches + self.working


def needed_memory(config: ModelConfig, plan: Plan, slots: int, context: int) -> Memory:
    """Return the memory that a model takes.

    Args:
        config: its shape.
        plan: how it is held.
        slots: answers at once.
        context: tokens of prompt plus output that each holds.
    """
    capacity = Sizes(plan, slots, context).capacity
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * capacity
    item = jnp.dtype(plan.cache).itemsize
    return Memory(
        weights=param_count(config) * jnp.dtype(plan.weights).itemsize,
        caches=slots * numbers * item,
        working=slots * _STATE_BYTES * config.vocab_size
        + _temporary(config, plan.kernels, max(plan.prefill_sizes), slots, capacity, item)
        # XLA on a TPU turns some layers' caches of one slot to another layout for a prefill.
        + (0 if plan.batch_invariant else numbers * item // 8),
    )


def _temporary(
    config: ModelConfig, kernels: KernelChoice, chunk: int, slots: int, capacity: int, item: int
) -> int:
    """Return an upper bound on the bytes of the largest program's temporary arrays."""
    seen = {"whole": capacity, "tree": capacity, "native": 0}
    prefill = kernels.prefill_attention or kernels.attention
    scores = config.num_heads * max(
        chunk * seen.get(prefill, BLOCK), slots * seen.get(kernels.attention, BLOCK)
    )
    activations = chunk * (3 * config.ffn_dim + 4 * config.dim)
    # Of each slot's last token, or of every token of a prompt that is scored.
    logits = max(8 * max(slots, kernels.decode_rows or 1), 4 * chunk) * config.vocab_size
    # Scores in float32, and once more as the weights of values.
    return scores * (4 + item) + 4 * max(activations, logits)


def available_memory(device: Device) -> int | None:
    """Return the bytes that may still be taken on a device; None: it does not tell.

    Of a GPU or TPU it is what JAX may take (XLA_PYTHON_CLIENT_MEM_FRACTION of a GPU's memory).
    """
    if device.platform == "cpu":
        return free_memory()
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else max(0, limit - stats.get("bytes_in_use", 0))


def memory_fraction(platform: str) -> float:
    """Return the share of a device's memory that JAX takes: of a GPU's, what its variable says."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) if platform == "gpu" else 1


def check_fits(config: ModelConfig, plan: Plan, slots: int, context: int) -> None:
    """Refuse a model that JAX's default device has no room for.

    Args:
        config: its shape.
        plan: how it is held.
        slots, context: see `needed_memory`.

    Raises:
        InputError: with the sum, and what is available.
    """
    device = default_device()
    memory, room = needed_memory(config, plan, slots, context), available_memory(device)
    if room is None or memory.total <= room:
        return
    more = "" if device.platform == "cpu" else ", or more of it (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    raise InputError(
        f"the model needs {in_units(memory.total)}: {in_units(memory.weights)} of weights, "
        f"{in_units(memory.caches)} of caches ({slots:,} slots of {context:,} tokens) and "
        f"{in_units(memory.working)} to work with; the {device.platform.upper()} has "
        f"{in_units(room)} left; choose fewer slots, a smaller context, a 16-bit dtype{more}"
    )


def in_units(count: int) -> str:
    """Return bytes as text: in GB from 10^9 on, else in MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
