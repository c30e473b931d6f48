"""Plan: how a model is held and computed on a machine. All that differs between backends is here.

Each choice was measured; docs/performance.md has the figures and the commands.
"""

from typing import NamedTuple

from llama_jax.config import ModelConfig
from llama_jax.decode.host import total_memory
from llama_jax.errors import InputError
from llama_jax.jax_settings import default_device
from llama_jax.nn.cpu_kernels import has_kernels
from llama_jax.nn.kernel_choice import NATIVE, KernelChoice
from llama_jax.nn.sharding import num_params

DETERMINISM = ("strict", "fast")
"""strict: the tokens of a request depend neither on the number of slots nor on other requests.
fast: where that costs time, they may."""

NARROW_WINDOWS = 4, 8
"""Widths of windows with fewer drafts than the most: on a CPU up to 4 rows cost little."""

DECODE_ROWS = 8
"""Rows of a product of strict plans: slots are padded to a multiple of them. A server has so many
by default, and a TPU's tiles too."""


class Plan(NamedTuple):
    """How `Executor` compiles its programs. Static: another plan is another set of programs."""

    weights: str
    """The dtype that weights which are not quantized are held in: the run's, or float32 where that
    is faster."""
    cache: str
    """The dtype that keys and values are held in; see `cache.init_cache`."""
    kernels: KernelChoice
    prefill_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Tokens per prefill chunk, each a multiple of the one before; see `Sizes.chunks`."""
    decode_steps: int = 8
    """Tokens decoded per call, at most."""
    varied_steps: bool = True
    """A call may run fewer, and ends once all slots are done: one program for any number."""
    max_in_flight: int = 1
    """Calls in flight before the oldest one's tokens are read."""
    draft_tokens: int = 0
    """Tokens that may be drafted and then verified in one pass; 0: no speculation."""

    @property
    def by_bucket(self) -> bool:
        """Whether attention needs a static bound on the positions it reads."""
        return self.kernels.attention != "native"

    @property
    def batch_invariant(self) -> bool:
        """Whether a logit's bits depend on its slot's tokens alone.

        They do not depend on the batch or on how tokens were cut into chunks. Otherwise a prompt is
        always cut alike, and all slots decode together.
        """
        kernels = self.kernels
        return {kernels.projection, kernels.attention, kernels.norm, kernels.rope} == {"native"}

    @property
    def slots_invariant(self) -> bool:
        """Whether a logit's bits depend neither on the number of slots nor on their lengths."""
        in_one_sum = self.kernels.attention == "whole"
        return self.batch_invariant or (self.kernels.decode_rows is not None and not in_one_sum)

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens of a slot that one pass computes, in rising order: the last one and its drafts.

        A narrower window takes less time. Where bits may depend on its width there is but one.
        """
        if not self.draft_tokens:
            return ()
        widest = self.draft_tokens + 1
        narrower = (width for width in NARROW_WINDOWS if width < widest and self.batch_invariant)
        return (*narrower, widest)

    def speculating(self, draft_tokens: int) -> "Plan":
        """Return the plan with speculation, or without for 0.

        Drafts are made from tokens that were read, so one call is in flight.
        """
        if not draft_tokens:
            return self
        return self._replace(draft_tokens=draft_tokens, max_in_flight=1)

    @property
    def reuse_multiple(self) -> int:
        """Tokens of a text already in the cache are reused in multiples of this."""
        return self.prefill_sizes[0 if self.batch_invariant else -1]


def choose_plan(config: ModelConfig, dtype: str, determinism: str = "strict") -> Plan:
    """Return the fastest plan known for JAX's default device.

    Args:
        config: the model's shape.
        dtype: the run's, of weights and cache.
        determinism: one of DETERMINISM.

    Raises:
        InputError: it is none of them.
    """
    _check_determinism(determinism)
    platform = default_device().platform
    if platform != "cpu":
        return accelerator_plan(platform, dtype, determinism)
    plan = _cpu_plan(config, dtype)
    if determinism == "fast" or plan.batch_invariant:
        return plan
    # The product of one row has other bits than that of eight.
    projection = "plain" if plan.kernels.projection == "two_rows" else plan.kernels.projection
    kernels = KernelChoice(projection, "rows", "plain", "blocks", DECODE_ROWS)
    return plan._replace(kernels=kernels)


def _cpu_plan(config: ModelConfig, dtype: str) -> Plan:
    # Here host and device are the same cores: a chunk run ahead would hide nothing, and the one
    # after EOS is wasted.
    cache = "uint16" if dtype == "bfloat16" else dtype
    if has_kernels():
        # Chunks no longer than it takes to draw a few tokens: answers under way go on beside a long
        # prompt. Longer ones would read it no faster.
        return Plan(dtype, cache, NATIVE, (16, 32, 64, 128))
    if config.is_quantized:  # XLA would widen whole weights
        return Plan(dtype, cache, KernelChoice("blocked", "blocks"))
    if dtype == "bfloat16":
        return Plan(dtype, cache, KernelChoice("two_rows", "blocks"))
    if dtype == "float32" or _fits(6 * num_params(config)):
        return Plan("float32", cache, KernelChoice("plain", "blocks"))
    return Plan(dtype, cache, KernelChoice("blocked", "blocks"))


def accelerator_plan(platform: str, dtype: str, determinism: str = "strict") -> Plan:
    """Return the plan for a GPU or TPU.

    Args:
        platform: as JAX names it.
        dtype, determinism: see `choose_plan`.
    """
    _check_determinism(determinism)
    # A TPU runs loops by itself; a GPU's host would launch each turn's kernels. A chunk's bucket
    # follows from its own place in the prompt, but that of a decode step from all slots: its bits
    # must not depend on it.
    attention, prefill_attention = ("loop", "loop") if platform == "tpu" else ("tree", "whole")
    kernels = KernelChoice("plain", attention, "plain", prefill_attention, DECODE_ROWS)
    if determinism == "fast":
        kernels = kernels._replace(attention="whole", decode_rows=None)
    # Few sizes, since each is compiled for each bucket, and up to 64 tokens take hardly longer than
    # one. The host is idle while the device decodes: one more dispatch is queued then.
    # Of a loop whose length is an argument a GPU would ask its host before each turn of it.
    return Plan(
        dtype,
        dtype,
        kernels,
        prefill_sizes=(64, 256),
        decode_steps=16,
        varied_steps=False,
        max_in_flight=2,
    )


def _check_determinism(determinism: str) -> None:
    if determinism not in DETERMINISM:
        raise InputError(
            f"determinism is {determinism!r}, expected {' or '.join(DETERMINISM)}; choose one"
        )


def _fits(size: int) -> bool:
    """Return whether so many bytes leave a third of the memory; no, if the system does not tell."""
    return size < 2 * (total_memory() or 0) // 3
