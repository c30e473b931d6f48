"""Pace: whether drafts are worth their time, from what was accepted and how long passes took.

It decides on time alone: whatever it chooses, the tokens are the same.
"""

import collections
import statistics
from collections.abc import Sequence

MARGIN = 1.03
"""By so much a pass with drafts must promise to be faster."""

_MEMORY = 0.9
"""How much of what was accepted counts after the next drafts."""
_FORGETTING = 0.97
"""The same after a turn in which nothing was learned, so that drafts are tried again."""
_TRUST = 2.0
"""Drafts for which the rate that is expected beforehand counts."""
_TIMES = 5
"""Passes of which the median is taken."""
_ROW_COST = 0.07
"""What a further row is taken to add to a pass of one, before any was timed."""
_DRAFT_COST = 0.15
"""The same of a draft that a model makes."""


class Rate:
    """How likely a draft of one answer is accepted.

    Args:
        expected: before any was verified.
    """

    def __init__(self, expected: float):
        self._expected = expected
        self._accepted = self._tried = 0.0

    def observe(self, accepted: int, drafted: int) -> None:
        """Count drafts that were verified: those after the first that is rejected say nothing."""
        if drafted:
            self._accepted = _MEMORY * self._accepted + accepted
            self._tried = _MEMORY * self._tried + min(drafted, accepted + 1)

    def forget(self) -> None:
        """Count what was observed for less."""
        self._accepted *= _FORGETTING
        self._tried *= _FORGETTING

    def gain(self, drafts: int) -> float:
        """Return how many of so many drafts are likely to be accepted."""
        rate = (self._accepted + _TRUST * self._expected) / (self._tried + _TRUST)
        return sum(rate**place for place in range(1, drafts + 1))


class Pace:
    """What passes cost, and which to make.

    Args:
        is_free: drafts cost no time.
        eager: take the widest window that drafts fill, whatever it costs; for tests.
    """

    def __init__(self, *, is_free: bool, eager: bool = False):
        self._is_free, self._eager = is_free, eager
        self._costs: dict[tuple[int, int], float] = {}
        self._seconds: dict[tuple[int, int], collections.deque[float]] = {}

    def choose(
        self, count: int, windows: Sequence[int], rates: Sequence[Rate], drafts: Sequence[int]
    ) -> int:
        """Return the width of the window that promises the most tokens a second; 1: none.

        Args:
            count: slots that a program computes.
            windows: the widths that there are, in rising order.
            rates: of each answer in them.
            drafts: of each, how many there are or would be.
        """
        if not any(drafts) or not windows:
            return 1
        if self._eager:
            most = max(drafts) + 1
            return next((width for width in windows if width >= most), windows[-1])
        speeds = {1: MARGIN}
        for width in windows:
            own = zip(rates, drafts, strict=True)
            gain = sum(rate.gain(min(length, width - 1)) for rate, length in own)
            speeds[width] = (1 + gain / len(rates)) / self.cost(count, width)
        chosen = max(speeds, key=lambda width: speeds[width])
        if chosen == 1:
            self._doubt(count)
        return chosen

    def observe(self, count: int, width: int, seconds: float) -> None:
        """Count how long a pass took, its drafts included; of width 1: a step without drafts."""
        times = self._seconds.setdefault((count, width), collections.deque(maxlen=_TIMES))
        times.append(seconds)
        base = self._seconds.get((count, 1))
        if base and width > 1 and (least := statistics.median(base)) > 0:
            self._costs[count, width] = statistics.median(times) / least

    def cost(self, count: int, width: int) -> float:
        """Return how long a pass takes, a step without drafts being 1."""
        return self._costs.get((count, width), self._usual_cost(count, width))

    def _usual_cost(self, count: int, width: int) -> float:
        drafting = 0 if self._is_free else _DRAFT_COST * (width - 1)
        return 1 + _ROW_COST * count * (width - 1) + drafting

    def _doubt(self, count: int) -> None:
        """Move costs towards the usual ones: one slow pass must not decide for ever."""
        for (slots, width), cost in self._costs.items():
            if slots == count:
                usual = self._usual_cost(count, width)
                self._costs[slots, width] = usual + (cost - usual) * _FORGETTING**0.5
