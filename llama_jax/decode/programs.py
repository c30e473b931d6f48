"""Programs: what runs on the device, one descriptor for each.

A descriptor is a value: equal ones are one program. It has the function to compile, and a method
`arguments` that makes the arguments of a call. Warm-up uses the same method, so each signature
stands in one place. `compiled.py` compiles them.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling, state, steps
from llama_jax.decode.needs import ALL_NEEDS, Needs
from llama_jax.decode.sizes import Sizes
from llama_jax.decode.state import Admission, DecodeState
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Params, Transformer


@dataclasses.dataclass(frozen=True)
class Target:
    """What programs are compiled for: a model and the shape of its decode state."""

    config: ModelConfig
    model: Transformer
    batch: int
    """Slots."""
    capacity: int
    """Cache positions of each slot."""
    cache_dtype: str
    mesh: Mesh
    """The devices that hold the model; see `sharding.make_mesh`."""
    drawable: int | None = None
    """Only ids below it are sampled; None: all."""


class Program(abc.ABC):
    """A function at fixed sizes; its `str` is its name."""

    runs_model: ClassVar[bool] = False
    """The function gathers from the target's devices what each has a part of."""
    donated: ClassVar[tuple[int, ...]]
    """Indices of the arguments that a call consumes."""

    @abc.abstractmethod
    def function(self, target: Target) -> Callable[..., Any]:
        """Return the pure function to compile."""


@dataclasses.dataclass(frozen=True)
class InitState(Program):
    """Make a decode state of idle slots."""

    donated: ClassVar[tuple[int, ...]] = ()

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.init_state` at the target's sizes."""
        sizes = target.config, target.batch, target.capacity, target.cache_dtype
        return lambda: state.init_state(*sizes)

    def __str__(self) -> str:
        return "init_state"


@dataclasses.dataclass(frozen=True)
class InitCache(Program):
    """Make the cache of one slot, for `Logits`."""

    donated: ClassVar[tuple[int, ...]] = ()

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `cache.init_cache` at the target's sizes."""
        sizes = target.config, 1, target.capacity, target.cache_dtype
        return lambda: kv.init_cache(*sizes)

    def __str__(self) -> str:
        return "init_cache"


@dataclasses.dataclass(frozen=True)
class Admit(Program):
    """Give a slot to a request."""

    donated: ClassVar[tuple[int, ...]] = (0,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.admit`."""
        return state.admit

    def arguments(self, old: DecodeState, slot: int, new: Admission) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return old, np.int32(slot), new

    def __str__(self) -> str:
        return "admit"


class SlotProgram(Program):
    """Change one slot."""

    donated: ClassVar[tuple[int, ...]] = (0,)

    def arguments(self, old: DecodeState, slot: int = 0) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return old, np.int32(slot)


@dataclasses.dataclass(frozen=True)
class Release(SlotProgram):
    """End a slot's request early."""

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.release`."""
        return state.release

    def __str__(self) -> str:
        return "release"


@dataclasses.dataclass(frozen=True)
class ClearSlot(SlotProgram):
    """Set the cache of one slot to zero."""

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.clear_slot`."""
        return state.clear_slot

    def __str__(self) -> str:
        return "clear_slot"


@dataclasses.dataclass(frozen=True)
class CopySlot(Program):
    """Copy the cache of one slot to another."""

    donated: ClassVar[tuple[int, ...]] = (0,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.copy_slot`."""
        return state.copy_slot

    def arguments(self, old: DecodeState, source: int = 0, to: int = 0) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return old, np.int32(source), np.int32(to)

    def __str__(self) -> str:
        return "copy_slot"


@dataclasses.dataclass(frozen=True)
class Prefill(Program):
    """Read one chunk of a prompt."""

    size: int
    """Tokens, padding included."""
    attend_len: int
    runs_model: ClassVar[bool] = True
    donated: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.prefill` at these sizes."""
        return functools.partial(steps.prefill, target.model, attend_len=self.attend_len)

    def arguments(
        self,
        params: Params,
        old: DecodeState,
        slot: int = 0,
        prompt: Sequence[int] = (0,),
        start: int = 0,
    ) -> tuple[Any, ...]:
        """Return the arguments of a call that reads the prompt's tokens from `start` on."""
        length = np.int32(min(self.size, len(prompt) - start))
        return params, old, np.int32(slot), padded_chunk(prompt, start, self.size), length

    def __str__(self) -> str:
        return f"prefill({self.size}, {self.attend_len})"


@dataclasses.dataclass(frozen=True)
class Score(Program):
    """Return the log-probabilities of a prompt's tokens, of one chunk."""

    size: int
    """Tokens, padding included."""
    runs_model: ClassVar[bool] = True
    donated: ClassVar[tuple[int, ...]] = ()

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.score`."""
        return functools.partial(steps.score, target.model)

    def arguments(
        self, params: Params, hidden: Any, prompt: Sequence[int], start: int
    ) -> tuple[Any, ...]:
        """Return the arguments of a call for the chunk that begins at `start`."""
        return params, hidden, padded_chunk(prompt, start + 1, self.size)

    def __str__(self) -> str:
        return f"score({self.size})"


@dataclasses.dataclass(frozen=True)
class FirstToken(Program):
    """Sample the first token of a slot whose prompt is read."""

    needs: Needs = ALL_NEEDS
    runs_model: ClassVar[bool] = True
    donated: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.first_token` for these needs."""
        return functools.partial(
            steps.first_token, target.model, needs=self.needs, drawable=target.drawable
        )

    def arguments(self, params: Params, old: DecodeState, slot: int, last: Any) -> tuple[Any, ...]:
        """Return the arguments of a call; `last` is of the prompt's last chunk."""
        return params, old, np.int32(slot), last

    def __str__(self) -> str:
        return f"first_token({str(self.needs).removeprefix(', ')})"


@dataclasses.dataclass(frozen=True)
class Decode(Program):
    """Run some decode steps of some slots."""

    slots: int
    """How many are computed."""
    num_steps: int
    attend_len: int
    needs: Needs = ALL_NEEDS
    runs_model: ClassVar[bool] = True
    donated: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.decode` at these sizes."""
        return functools.partial(
            steps.decode,
            target.model,
            needs=self.needs,
            num_steps=self.num_steps,
            attend_len=self.attend_len,
            drawable=target.drawable,
        )

    def arguments(self, params: Params, old: DecodeState, slots: Sequence[int]) -> tuple[Any, ...]:
        """Return the arguments of a call; all slots, in order, are given no indices."""
        if len(slots) == old.tokens.shape[0]:
            return params, old
        return params, old, np.asarray(slots, np.int32)

    def __str__(self) -> str:
        return f"decode({self.slots}, {self.num_steps}, {self.attend_len}{self.needs})"


@dataclasses.dataclass(frozen=True)
class Logits(Program):
    """Return the logits after every token of a chunk."""

    size: int
    attend_len: int
    runs_model: ClassVar[bool] = True
    donated: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.logits_of_text` at these sizes."""
        return functools.partial(steps.logits_of_text, target.model, attend_len=self.attend_len)

    def arguments(
        self, params: Params, cache: kv.KVCache, tokens: Sequence[int], start: int
    ) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return params, cache, np.int32(start), padded_chunk(tokens, start, self.size)

    def __str__(self) -> str:
        return f"logits({self.size}, {self.attend_len})"


def serving_programs(sizes: Sizes) -> Iterator[Program]:
    """Yield the programs that serve every request at these sizes; `Score` is not among them."""
    yield from (InitState(), Admit(), Release(), CopySlot(), FirstToken())
    for bucket in sizes.buckets:
        for size in sizes.plan.prefill_sizes:
            if size <= bucket:
                yield Prefill(size, bucket)
        for count in sizes.decode_counts:
            yield Decode(count, sizes.plan.decode_steps, bucket)


def padded_chunk(tokens: Sequence[int], start: int, size: int) -> np.ndarray:
    """Return `size` tokens from `start` on, padded on the right with id 0."""
    part = np.asarray(tokens[start : start + size], np.int32)
    return np.pad(part, (0, size - len(part)))


def empty_admission(config: ModelConfig) -> Admission:
    """Return an admission of the right shapes, for warm-up."""
    return state.make_admission(
        sampling.make_params(), [0], config.vocab_size, limit=1, stop_tokens=config.eos_tokens
    )
