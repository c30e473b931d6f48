"""Ledger: which lines ended their worker, and how often: an actor beside the workers.

Ray Data runs the call of a worker that died again, as often as it takes. So a line that ends every
process that reads it would be tried for ever. A worker records each line before it answers it.
"""

import collections
from collections.abc import Sequence

MOST_ENDS = 3
"""Workers that one line may end before it is answered by an error."""

MOST_STARTS = 3
"""Times that a worker may start, for each worker there is, without a line answered since."""


class Ledger:
    """What the workers of one run have begun and not ended.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: int):
        self._begun = collections.Counter[int]()
        self._most_starts, self._starts = MOST_STARTS * workers, 0

    def start(self) -> bool:
        """Record that a worker starts; return False if too many did without an answer."""
        self._starts += 1
        return self._starts <= self._most_starts

    def begin(self, lines: Sequence[int], *, alone: bool) -> list[int]:
        """Return how many workers each line has ended, and record that a worker begins them.

        Unless a line is answered alone, those of which one has ended a worker are not begun.
        """
        ends = [self._begun[line] for line in lines]
        if alone or not any(ends):
            self._begun.update(lines)
        return ends

    def end(self, lines: Sequence[int]) -> None:
        """Record that lines are answered."""
        self._starts = 0
        for line in lines:
            del self._begun[line]
