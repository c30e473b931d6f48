"""Programs of speculation: to verify drafts, and to draw them by a small model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from llama_jax.decode.draft import LAST, draft
from llama_jax.decode.model_programs import ModelProgram
from llama_jax.decode.needs import ALL_NEEDS, Needs
from llama_jax.decode.program import Target
from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.decode.state import DecodeState
from llama_jax.decode.verify import verify
from llama_jax.nn.transformer import Params


@dataclasses.dataclass(frozen=True)
class Verify(ModelProgram):
    """Draw the next tokens of some slots as far as drafts equal them."""

    num_slots: int
    """How many are computed, as many of each replica."""
    width: int
    """Tokens of each: the last one and its drafts."""
    attend_len: int
    needs: Needs = ALL_NEEDS
    donated: ClassVar[tuple[int, ...]] = (1,)
    slots: ClassVar[tuple[int, ...]] = (3,)
    per_replica: ClassVar[tuple[int, ...]] = (2, 3)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `verify` at these sizes."""
        return functools.partial(
            verify,
            target.model,
            needs=self.needs,
            attend_len=self.attend_len,
            drawable=target.drawable,
        )

    def arguments(
        self,
        params: Params,
        old: DecodeState,
        slots: Sequence[int],
        drafts: Sequence[Sequence[int]] = (),
    ) -> tuple[Any, ...]:
        """Return the arguments of a call; all slots, in order, are given no indices.

        Args:
            params, old: the model's parameters, and the state.
            slots: those to compute.
            drafts: of each of them, at most width - 1; none are given to warm up.
        """
        drafts = drafts or [()] * len(slots)
        return params, old, padded_rows(drafts, self.width - 1), *_indices(old, slots)

    def __str__(self) -> str:
        return f"verify({self.num_slots}, {self.width}, {self.attend_len}{self.needs})"


@dataclasses.dataclass(frozen=True)
class Draft(ModelProgram):
    """Draw drafts for some slots; no replica, no process beside this one."""

    num_slots: int
    num_drafts: int
    attend_len: int
    needs: Needs = ALL_NEEDS
    donated: ClassVar[tuple[int, ...]] = (1,)
    slots: ClassVar[tuple[int, ...]] = (6,)
    per_replica: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6)

    def function(self, target: Target) -> Callable[..., Any]:
        """Return `draft` at these sizes."""
        return functools.partial(
            draft,
            target.model,
            num_drafts=self.num_drafts,
            needs=self.needs,
            attend_len=self.attend_len,
            drawable=target.drawable,
        )

    def arguments(
        self,
        params: Params,
        old: DecodeState,
        slots: Sequence[int],
        texts: Sequence[tuple[Sequence[int], int, Sequence[int]]] = (),
    ) -> tuple[Any, ...]:
        """Return the arguments of a call; all slots, in order, are given no indices.

        Args:
            params, old: the model's parameters, and the state.
            slots: those to compute.
            texts: of each its tokens, prompt and output, how many are the output's, and the last
                of them that are not counted yet; none are given to warm up.
        """
        texts = texts or [([0] * LAST, 1, ())] * len(slots)
        last = np.asarray([text[-LAST:] for text, _, _ in texts], np.int32)
        starts = np.asarray([len(text) - LAST for text, _, _ in texts], np.int32)
        steps = np.asarray([count for _, count, _ in texts], np.int32)
        accepted = padded_rows([new for _, _, new in texts], self.num_drafts + 1)
        return params, old, last, starts, steps, accepted, *_indices(old, slots)

    def __str__(self) -> str:
        return f"draft({self.num_slots}, {self.num_drafts}, {self.attend_len}{self.needs})"


def padded_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return tokens [rows, width], with NO_TOKEN after those of each row."""
    array = np.full((len(rows), width), NO_TOKEN, np.int32)
    for own, row in zip(array, rows, strict=True):
        own[: len(row)] = row
    return array


def _indices(old: DecodeState, slots: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return the argument for some slots; none for all, in order."""
    return () if len(slots) == old.tokens.shape[0] else (np.asarray(slots, np.int32),)
