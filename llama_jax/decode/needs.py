"""Needs: which parts of a sampling step some requests need, known to the host before the call.

Each set of needs is a program of its own, so that none asks the device what to compute: a GPU would
stop for the answer in every step.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.decode.sampling import GREEDY_BELOW, SamplingParams


class Needs(NamedTuple):
    """Static. A program for more needs gives the same tokens, in more time."""

    noise: bool = False
    """A row is drawn; without, every row takes its likeliest token."""
    filters: bool = False
    """A row that is drawn has top-k, top-p or min-p."""
    logprobs: bool = False
    """A row's log-probabilities are wanted."""

    def covers(self, other: "Needs") -> bool:
        """Return whether nothing is missing that another needs."""
        return all(own or not needed for own, needed in zip(self, other, strict=True))

    def __str__(self) -> str:
        """Return what a program's name says of it."""
        return "".join(f", {name}" for name, needed in self._asdict().items() if needed)


EVERY_NEEDS = [
    Needs(noise, filters, logprobs)
    for filters, noise, logprobs in itertools.product((False, True), repeat=3)
    if noise or not filters
]
"""In rising order of cost."""

ALL_NEEDS = EVERY_NEEDS[-1]


def needs_of(params: SamplingParams, *, logprobs: bool) -> Needs:
    """Return what one request needs.

    Args:
        params: of one row, as `make_params` returns them.
        logprobs: whether its log-probabilities are wanted.
    """
    noise = bool(params.temperature[0] >= np.float32(GREEDY_BELOW))
    cut = params.top_k[0] > 0 or params.top_p[0] < 1 or params.min_p[0] > 0
    return Needs(noise, noise and bool(cut), logprobs)


def together(needs: Iterable[Needs]) -> Needs:
    """Return what several requests need together."""
    return Needs(*(any(column) for column in zip(*needs, strict=True)))


def covering(needs: Needs) -> Iterator[Needs]:
    """Yield the needs whose programs serve these: themselves first, the most expensive last."""
    return (other for other in EVERY_NEEDS if other.covers(needs))
