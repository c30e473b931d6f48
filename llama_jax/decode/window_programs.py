"""Programs of speculation: to verify drafts, and to draw them by a small model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from llama_jax.decode.draft import LAST, draft
from llama_jax.decode.model_programs import ModelProgram, slot_indices
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
        """Return the arguments of a call; see `slot_indices`.

        Args:
            params, old: the model's parameters, and the state.
            slots: those to compute.
            drafts: of each of them, at most width - 1; none are given to warm up.
        """
        drafts = drafts or [()] * len(slots)
        return params, old, padded_rows(drafts, self.width - 1), *slot_indices(old, slots)

    def __str__(self) -> str:
        return f"verify({self.num_slots}, {self.width}, {self.attend_len}{self.needs})"


class Text(NamedTuple):
    """What is to be continued by drafts."""

    tokens: Sequence[int]
    """Of prompt and output, two at least."""
    num_drawn: int
    """How many of them are the output's."""
    uncounted: Sequence[int]
    """The last of these, which the state has not counted yet."""


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
        texts: Sequence[Text | None] = (),
    ) -> tuple[Any, ...]:
        """Return the arguments of a call; see `slot_indices`.

        Args:
            params, old: the model's parameters, and the state.
            slots: those to compute.
            texts: of each of them; None: nothing is drafted for it, and nothing that its cache
                holds is changed. None are given to warm up.
        """
        # The cache's last positions: no text with its drafts reaches them.
        unused = old.cache[0].k.shape[2] - self.num_drafts - 1
        own = [text or Text([0] * LAST, 1, ()) for text in texts or [None] * len(slots)]
        starts = [unused if text is None else len(text.tokens) - LAST for text in texts]
        return (
            params,
            old,
            np.asarray([text.tokens[-LAST:] for text in own], np.int32),
            np.asarray(starts or [unused] * len(slots), np.int32),
            np.asarray([text.num_drawn for text in own], np.int32),
            padded_rows([text.uncounted for text in own], self.num_drafts + 1),
            *slot_indices(old, slots),
        )

    def __str__(self) -> str:
        return f"draft({self.num_slots}, {self.num_drafts}, {self.attend_len}{self.needs})"


def padded_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return tokens [rows, width], with NO_TOKEN after those of each row."""
    array = np.full((len(rows), width), NO_TOKEN, np.int32)
    for own, row in zip(array, rows, strict=True):
        own[: len(row)] = row
    return array
