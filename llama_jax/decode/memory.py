"""Memory: what a model takes on its device, and what the device has left."""

import dataclasses
import os

import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.decode.host import free_memory
from llama_jax.decode.plan import Plan
from llama_jax.decode.sizes import Sizes
from llama_jax.errors import InputError
from llama_jax.jax_settings import Device
from llama_jax.nn.attention import BLOCK
from llama_jax.nn.sharding import ONE_DEVICE, Shards, replicas_of, shards_of, weight_bytes

_MUCH = 10**9
_STATE_BYTES = 9
"""For each token of the vocabulary: bias, count, and whether the prompt has it."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a model needs on each of its devices."""

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


def needed_memory(
    config: ModelConfig, plan: Plan, slots: int, context: int, shards: Shards = ONE_DEVICE
) -> Memory:
    """Return the memory that a model takes on each of its devices.

    Args:
        config: its shape.
        plan: how it is held.
        slots: answers at once, of one replica.
        context: tokens of prompt plus output that each holds.
        shards: into how many parts it is split.
    """
    sizes = Sizes(plan, slots, context)
    capacity = sizes.capacity
    heads = config.num_kv_heads // shards.kv
    numbers = 2 * config.num_layers * heads * config.head_dim * capacity
    item = jnp.dtype(plan.cache).itemsize
    return Memory(
        weights=weight_bytes(config, plan.weights, shards),
        caches=slots * numbers * item,
        working=slots * _STATE_BYTES * config.vocab_size
        + _temporary(config, sizes, shards)
        # XLA on a TPU turns some layers' caches of one slot to another layout for a prefill.
        + (0 if plan.batch_invariant else numbers * item // 8),
    )


def _temporary(config: ModelConfig, sizes: Sizes, shards: Shards) -> int:
    """Return an upper bound on the bytes of the largest program's temporary arrays."""
    plan, slots, capacity = sizes.plan, sizes.batch, sizes.capacity
    # Tokens that one pass decodes: one of each slot, or the windows of some.
    windows = (count * max(sizes.windows(count), default=1) for count in sizes.decode_counts)
    rows = max(slots, *windows)
    kernels, chunk, item = plan.kernels, max(plan.prefill_sizes), jnp.dtype(plan.cache).itemsize
    seen = {"whole": capacity, "tree": capacity, "native": 0}
    prefill = kernels.prefill_attention or kernels.attention
    scores = (
        config.num_heads
        // shards.devices
        * max(chunk * seen.get(prefill, BLOCK), rows * seen.get(kernels.attention, BLOCK))
    )
    activations = chunk * (3 * config.ffn_dim + 4 * config.dim)
    # Of each slot's last token, or of every token of a prompt that is scored.
    padded = max(rows, (kernels.decode_rows or 1) * max(plan.windows, default=1))
    logits = max(8 * padded, 4 * chunk) * config.vocab_size
    # Scores in float32, and once more as the weights of values.
    return scores * (4 + item) + 4 * max(activations, logits)


def available_memory(device: Device, count: int = 1) -> int | None:
    """Return the bytes that may still be taken on a device; None: it does not tell.

    Of a GPU or TPU it is what JAX may take (XLA_PYTHON_CLIENT_MEM_FRACTION of a GPU's memory). The
    devices of a CPU share its memory.

    Args:
        device: one of those that are used.
        count: how many are.
    """
    if device.platform == "cpu":
        free = free_memory()
        return None if free is None else free // count
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else max(0, limit - stats.get("bytes_in_use", 0))


def memory_fraction(platform: str) -> float:
    """Return the share of a device's memory that JAX takes: of a GPU's, what its variable says."""
    if platform != "gpu":
        return 1.0
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))


def check_fits(config: ModelConfig, plan: Plan, slots: int, context: int, mesh: Mesh) -> str:
    """Refuse a model that its devices have no room for.

    Args:
        config: its shape.
        plan: how it is held.
        slots, context: see `needed_memory`; the slots of all replicas.
        mesh: its devices.

    Returns:
        What it needs, and what is available, if that is over a gigabyte; else empty.

    Raises:
        InputError: with the sum, and what is available.
    """
    device, count = mesh.local_devices[0], len(mesh.local_devices)
    slots //= replicas_of(mesh)
    memory = needed_memory(config, plan, slots, context, shards_of(mesh))
    room = available_memory(device, count)
    each = f" on each of {mesh.size} devices" if mesh.size > 1 else ""
    label = f" ({config.label})" if config.label else ""
    needs = (
        f"the model needs {in_units(memory.total)}{each}{label}: {in_units(memory.weights)} of "
        f"weights, {in_units(memory.caches)} of caches ({slots:,} slot{'s' * (slots > 1)} of "
        f"{context:,} tokens) and {in_units(memory.working)} to work with"
    )
    if room is not None:
        needs += f"; the {device.platform.upper()} has {in_units(room)} left"
    if room is None or memory.total <= room:
        return needs if memory.total >= _MUCH else ""
    more = ", more devices, or more of it (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    more = "" if device.platform == "cpu" else more
    raise InputError(f"{needs}; choose fewer slots, a smaller context, a 16-bit dtype{more}")


def in_units(count: int) -> str:
    """Return bytes as text: in GB from 10^9 on, else in MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
