"""Programs that make or change a decode state without the model."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling, state
from llama_jax.decode.program import Program, Target
from llama_jax.decode.state import Admission, DecodeState
from llama_jax.nn import cache as kv


@dataclasses.dataclass(frozen=True)
class InitState(Program):
    """Make a decode state of idle slots."""

    donated: ClassVar[tuple[int, ...]] = ()

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.init_state` at the target's sizes."""
        sizes = target.config, target.batch, target.capacity, target.cache_dtype
        return lambda: state.init_state(*sizes)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return ()

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

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return ()

    def __str__(self) -> str:
        return "init_cache"


@dataclasses.dataclass(frozen=True)
class Admit(Program):
    """Give a slot to a request."""

    donated: ClassVar[tuple[int, ...]] = (0,)
    slots: ClassVar[tuple[int, ...]] = (1,)

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
    slots: ClassVar[tuple[int, ...]] = (1,)

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
    """Copy the cache of one slot to another of the same replica."""

    donated: ClassVar[tuple[int, ...]] = (0,)
    slots: ClassVar[tuple[int, ...]] = (1, 2)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `state.copy_slot`."""
        return state.copy_slot

    def arguments(self, old: DecodeState, source: int = 0, to: int = 0) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return old, np.int32(source), np.int32(to)

    def __str__(self) -> str:
        return "copy_slot"


def empty_admission(config: ModelConfig) -> Admission:
    """Return an admission of the right shapes, for warm-up."""
    return state.make_admission(
        sampling.make_params(), [0], config.vocab_size, limit=1, stop_tokens=config.eos_tokens
    )
