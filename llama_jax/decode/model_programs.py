"""Programs that run the model: each device on its part, see `compiled.lower`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from llama_jax.decode import steps, texts
from llama_jax.decode.needs import ALL_NEEDS, Needs
from llama_jax.decode.program import Program, Target
from llama_jax.decode.state import DecodeState
from llama_jax.decode.steps import ReadChunk
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Params


class ModelProgram(Program):
    """A function that gathers from the target's devices what each has a part of."""


@dataclasses.dataclass(frozen=True)
class Prefill(ModelProgram):
    """Read one chunk of a prompt."""

    size: int
    """Tokens, padding included."""
    attend_len: int
    donated: ClassVar[tuple[int, ...]] = (1,)
    slots: ClassVar[tuple[int, ...]] = (2,)

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
class Score(ModelProgram):
    """Return the log-probabilities of a prompt's tokens, of one chunk."""

    size: int
    """Tokens, padding included."""
    donated: ClassVar[tuple[int, ...]] = ()
    slots: ClassVar[tuple[int, ...]] = (2,)
    per_replica: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.score`, given the slot that the chunk was read into."""

        def score(params: Params, hidden: Any, slot: Any, targets: Any) -> steps.Logprobs:
            del slot  # says which replica has the chunk
            return steps.score(target.model, params, hidden, targets)

        return score

    def arguments(
        self, params: Params, chunk: ReadChunk, slot: int, prompt: Sequence[int], start: int
    ) -> tuple[Any, ...]:
        """Return the arguments of a call for the chunk that begins at `start`."""
        return params, chunk.hidden, np.int32(slot), padded_chunk(prompt, start + 1, self.size)

    def __str__(self) -> str:
        return f"score({self.size})"


@dataclasses.dataclass(frozen=True)
class FirstToken(ModelProgram):
    """Sample the first token of a slot whose prompt is read."""

    needs: Needs = ALL_NEEDS
    donated: ClassVar[tuple[int, ...]] = (1,)
    slots: ClassVar[tuple[int, ...]] = (2,)
    per_replica: ClassVar[tuple[int, ...]] = (3,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.first_token` for these needs."""
        return functools.partial(
            steps.first_token, target.model, needs=self.needs, drawable=target.drawable
        )

    def arguments(
        self, params: Params, old: DecodeState, slot: int, chunk: ReadChunk
    ) -> tuple[Any, ...]:
        """Return the arguments of a call after the prompt's last chunk."""
        return params, old, np.int32(slot), chunk.last

    def __str__(self) -> str:
        return f"first_token({str(self.needs).removeprefix(', ')})"


@dataclasses.dataclass(frozen=True)
class Decode(ModelProgram):
    """Run some decode steps of some slots."""

    num_slots: int
    """How many are computed, as many of each replica."""
    num_steps: int
    """At most, if the target's steps are varied."""
    attend_len: int
    needs: Needs = ALL_NEEDS
    donated: ClassVar[tuple[int, ...]] = (1,)
    slots: ClassVar[tuple[int, ...]] = (3,)
    per_replica: ClassVar[tuple[int, ...]] = (3,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `steps.decode` at these sizes."""
        return functools.partial(
            steps.decode,
            target.model,
            needs=self.needs,
            num_steps=self.num_steps,
            varied=target.varied_steps,
            attend_len=self.attend_len,
            drawable=target.drawable,
        )

    def arguments(
        self, params: Params, old: DecodeState, slots: Sequence[int], steps: int | None = None
    ) -> tuple[Any, ...]:
        """Return the arguments of a call; for the slots see `slot_indices`.

        Args:
            params, old: the model's parameters, and the state.
            slots: those to compute.
            steps: how many to run; None: `num_steps`.
        """
        count = np.int32(self.num_steps if steps is None else steps)
        return params, old, count, *slot_indices(old, slots)

    def __str__(self) -> str:
        return f"decode({self.num_slots}, {self.num_steps}, {self.attend_len}{self.needs})"


@dataclasses.dataclass(frozen=True)
class Logits(ModelProgram):
    """Return the logits after every token of a chunk."""

    size: int
    attend_len: int
    donated: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `texts.logits_of_text` at these sizes."""
        return functools.partial(texts.logits_of_text, target.model, attend_len=self.attend_len)

    def arguments(
        self, params: Params, cache: kv.KVCache, tokens: Sequence[int], start: int
    ) -> tuple[Any, ...]:
        """Return the arguments of a call."""
        return params, cache, np.int32(start), padded_chunk(tokens, start, self.size)

    def __str__(self) -> str:
        return f"logits({self.size}, {self.attend_len})"


@dataclasses.dataclass(frozen=True)
class CheckDraws(ModelProgram):
    """Draw again after every token of a chunk."""

    size: int
    attend_len: int
    needs: Needs
    donated: ClassVar[tuple[int, ...]] = (1,)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `texts.check_draws` at these sizes."""
        return functools.partial(
            texts.check_draws,
            target.model,
            needs=self.needs,
            attend_len=self.attend_len,
            drawable=target.drawable,
        )

    def arguments(
        self,
        params: Params,
        cache: kv.KVCache,
        tokens: Sequence[int],
        start: int,
        num_prompt: int,
        law: texts.Law,
    ) -> tuple[Any, ...]:
        """Return the arguments of a call for the chunk of a text that begins at `start`."""
        drawn = np.asarray(tokens[num_prompt:start], np.int32)
        counts = np.bincount(drawn, minlength=len(law.bias)).astype(np.int32)
        chunk = (padded_chunk(tokens, begin, self.size) for begin in (start, start + 1))
        return params, cache, counts, np.int32(start), *chunk, np.int32(num_prompt), law

    def __str__(self) -> str:
        return f"check_draws({self.size}, {self.attend_len}{self.needs})"


def padded_chunk(tokens: Sequence[int], start: int, size: int) -> np.ndarray:
    """Return `size` tokens from `start` on, padded on the right with id 0."""
    part = np.asarray(tokens[start : start + size], np.int32)
    return np.pad(part, (0, size - len(part)))


def slot_indices(old: DecodeState, slots: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return the argument for some slots; none for all, in order."""
    return () if len(slots) == old.tokens.shape[0] else (np.asarray(slots, np.int32),)
