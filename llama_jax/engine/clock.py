"""Clock: how long the engine worked, apart from the time that compiling took."""

import time

from llama_jax.decode.compiled import CompileLog


class Clock:
    """Seconds of work, and seconds of compiling within the engine's turns.

    Args:
        compiled: of each executor.
    """

    def __init__(self, *compiled: CompileLog):
        self.worked_s = 0.0
        self.compiled_s = 0.0
        self._compiled = compiled
        self._mark = self._now()

    def start(self) -> None:
        """Begin a turn: what passed since the last one does not count."""
        self._mark = self._now()

    def update(self) -> None:
        """Add the time since the turn's beginning, or since the last update in it."""
        (began, compiled_before), self._mark = self._mark, self._now()
        now, compiled_now = self._mark
        self.compiled_s += compiled_now - compiled_before
        self.worked_s += now - began - (compiled_now - compiled_before)

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), sum(log.waited_s for log in self._compiled)
