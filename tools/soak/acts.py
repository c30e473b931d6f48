"""Acts: what a client of the load may do, one thing after the other."""

import collections
import random
from collections.abc import Awaitable, Callable

from tools.soak.answers import WrongAnswerError


class Acts:
    """Things that a client may do, one of which is done at a time.

    Args:
        weights: how often each is done, relative to the others.
        rng: decides which.
        counts: what was done, by name; shared.
        forgiven: errors that are counted as a reset and are no fault.
    """

    def __init__(
        self,
        weights: dict[Callable[[], Awaitable[None]], float],
        rng: random.Random,
        counts: collections.Counter[str],
        forgiven: tuple[type[Exception], ...] = (),
    ):
        self._weights, self._rng = weights, rng
        self._counts, self._forgiven = counts, forgiven

    async def one(self) -> None:
        """Do one thing.

        Raises:
            WrongAnswerError: whatever went wrong, named by what was done.
        """
        [act] = self._rng.choices(list(self._weights), list(self._weights.values()))
        self._counts[act.__name__] += 1
        try:
            await act()
        except self._forgiven:
            self._counts[f"{act.__name__}: reset"] += 1
        except Exception as error:
            raise WrongAnswerError(
                f"{act.__name__}: {type(error).__name__}: {error}"[:300]
            ) from error
