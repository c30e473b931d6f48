"""Bursts: how many steps a turn runs, so that the text of answers that are streamed comes evenly.

It decides on time alone: however many steps a turn runs, the tokens are the same.
"""

import collections
import statistics

import jax
import numpy as np

from llama_jax.decode.executor import Executor
from llama_jax.decode.sampling import NO_TOKEN, AnyArray
from llama_jax.engine.clock import Clock

BURST_S = 0.016
"""How long the steps of a turn may take that is streamed, unless a single one takes longer: what
comes within one frame of a screen is seen at once. A turn's own time is a small part of it."""

_TURNS = 5
"""Turns of which the median is taken."""


class Bursts:
    """Choose how many steps each turn runs, and learn how long a step takes; not thread-safe.

    Args:
        executor: what runs them.
        clock: the engine's.
    """

    def __init__(self, executor: Executor, clock: Clock):
        self.ran = 0
        """Steps of the last turn: their loop ends once all slots are done."""
        plan, self._clock = executor.plan, clock
        self._most = plan.decode_steps
        # Processes that decide by themselves must not do so by time, and of calls that overlap it
        # cannot be said how long one takes.
        decides = executor.lockstep is not None or jax.process_count() == 1
        self._varied = plan.varied_steps and plan.max_in_flight == 1 and decides
        self._seconds: dict[int, collections.deque[float]] = {}
        """Of a step, by the slots that it computes."""
        self._began = 0.0

    def begin(self, count: int, *, streamed: bool) -> int:
        """Return how many steps to run now.

        Args:
            count: slots that a step computes.
            streamed: somebody reads an answer as it comes.
        """
        self._clock.update()
        self._began = self._clock.worked_s
        if not (streamed and self._varied):
            return self._most
        if not (times := self._seconds.get(count)):
            return 1
        return max(1, min(self._most, int(BURST_S / max(1e-9, statistics.median(times)))))

    def end(self, tokens: AnyArray) -> None:
        """Note how long the steps took whose tokens [steps, slots computed] were handed over."""
        self._clock.update()
        seconds = self._clock.worked_s - self._began
        self.ran = max(1, int(np.any(tokens != NO_TOKEN, axis=1).sum()))
        times = self._seconds.setdefault(tokens.shape[1], collections.deque(maxlen=_TURNS))
        times.append(seconds / self.ran)
