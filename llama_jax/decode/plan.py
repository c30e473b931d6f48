"""Plan: how a model is held and computed on a machine. All that differs between backends is here.

Each choice was measured; docs/performance.md has the figures and the commands.
"""

from typing import NamedTuple

from llama_jax.config import ModelConfig
from llama_jax.decode.host import total_memory
from llama_jax.jax_settings import default_device
from llama_jax.nn.cpu_kernels import has_kernels
from llama_jax.nn.transformer import KernelChoice, param_count


class Plan(NamedTuple):
    """How `Executor` compiles its programs. Static: another plan is another set of programs."""

    weights: str
    """The dtype that weights are held in: the run's, or float32 where that is faster."""
    cache: str
    """The dtype that keys and values are held in; see `cache.init_cache`."""
    kernels: KernelChoice
    prefill_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Tokens per prefill chunk, each a multiple of the one before; see `Sizes.chunks`."""
    decode_steps: int = 8
    """Tokens decoded per call."""
    max_in_flight: int = 1
    """Calls in flight before the oldest one's tokens are read."""

    @property
    def by_bucket(self) -> bool:
        """Whether attention needs a static bound on the positions it reads."""
        return self.kernels.attention != "native"

    @property
    def batch_invariant(self) -> bool:
        """Whether a logit's bits depend on its slot's tokens alone.

        They do not depend on the batch or on how tokens were cut into chunks. Otherwise both are
        kept fixed, so that the same request gives the same tokens.
        """
        return set(self.kernels) == {"native"}

    @property
    def reuse_multiple(self) -> int:
        """Tokens of a text already in the cache are reused in multiples of this."""
        return self.prefill_sizes[0 if self.batch_invariant else -1]


def choose_plan(config: ModelConfig, dtype: str) -> Plan:
    """Return the fastest plan known for JAX's default device.

    Args:
        config: the model's shape.
        dtype: the run's, of weights and cache.
    """
    if default_device().platform != "cpu":
        return accelerator_plan(dtype)
    # Here host and device are the same cores: a chunk run ahead would hide nothing, and the one
    # after EOS is wasted.
    cache = "uint16" if dtype == "bfloat16" else dtype
    if has_kernels():
        # Chunks no longer than it takes to draw a few tokens: answers under way go on beside a long
        # prompt. Longer ones would read it no faster.
        return Plan(dtype, cache, KernelChoice("native", "native", "native"), (16, 32, 64, 128))
    if dtype == "bfloat16":
        return Plan(dtype, cache, KernelChoice("two_rows", "blocks"))
    if dtype == "float32" or _fits(6 * param_count(config)):
        return Plan("float32", cache, KernelChoice("plain", "blocks"))
    return Plan(dtype, cache, KernelChoice("blocked", "blocks"))


def accelerator_plan(dtype: str) -> Plan:
    """Return the plan for a GPU or TPU; `dtype` is the run's."""
    # Few sizes, since each is compiled for each bucket, and up to 64 tokens take hardly longer than
    # one. The host is idle while the device decodes: one more dispatch is queued then.
    kernels = KernelChoice("plain", "whole")
    return Plan(dtype, dtype, kernels, (64, 256), decode_steps=16, max_in_flight=2)


def _fits(size: int) -> bool:
    """Return whether so many bytes leave a third of the memory; no, if the system does not tell."""
    return size < 2 * (total_memory() or 0) // 3
