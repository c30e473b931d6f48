"""Selftest: recorded runs of the demo model, repeated here in several ways."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator

from llama_jax.demo import SELFTEST
from llama_jax.llama import Llama
from llama_jax.receipt.reading import read_receipts
from llama_jax.replay.replay import replay
from llama_jax.replay.verdict import Outcome, Verdict

EVERY = 3
"""Of the runs with one slot, which take longest: every third."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One way to repeat the runs."""

    how: str
    shows: str
    """On what the tokens do not depend, if it passes."""
    verdicts: list[Verdict]

    @property
    def failures(self) -> list[Verdict]:
        """Those that did not give the same tokens. No recorded margin is small enough for a tie."""
        return [each for each in self.verdicts if each.outcome.status]

    def __str__(self) -> str:
        outcomes = [each.outcome.name for each in self.verdicts]
        counts = {o.name: outcomes.count(o.name) for o in Outcome if o.name in outcomes}
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"{self.how:<24}{found:<24}{self.shows}"


def selftest(
    load: Callable[[int], Llama], update: Callable[[], object] = lambda: None
) -> Iterator[Part]:
    """Repeat the recorded runs in each way; yield what was found.

    Args:
        load: returns the demo model with so many slots.
        update: called after each run.
    """

    def counted(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
        for each in verdicts:
            update()
            yield each

    receipts = list(read_receipts(SELFTEST))
    shuffled = random.Random(0).sample(receipts, len(receipts))
    many = load(8)
    yield Part("8 slots, other order", "neighbours, order", list(counted(replay(many, shuffled))))
    checked = counted(replay(many, receipts, prefill=True))
    yield Part("in one pass", "chunks of the text", list(checked))
    few = load(1)
    yield Part("1 slot", "number of slots", list(counted(replay(few, receipts[::EVERY]))))


def num_runs() -> int:
    """Return how often a run is repeated, in all parts."""
    count = len(list(read_receipts(SELFTEST)))
    return 2 * count + len(range(0, count, EVERY))
