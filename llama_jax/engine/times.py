"""Times: when a generation waited and progressed."""

import time

from llama_jax.engine.clock import Clock
from llama_jax.engine.result import Timings


class Times:
    """When a generation waited (wall-clock time) and progressed (the engine's clock)."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.submitted = time.perf_counter()
        self._compiled = clock.compiled_s
        self._queue_s: float | None = None
        self._began = self._first = self._last = clock.worked_s
        self._count = 0

    def begin(self) -> None:
        """Note that it has a slot."""
        self._queue_s = self._waited()
        self._began = self._first = self._last = self._clock.worked_s

    def token(self) -> None:
        """Note a token, at the engine's time."""
        self._count += 1
        self._last = self._clock.worked_s
        if self._count == 1:
            self._first = self._last

    def _waited(self) -> float:
        return time.perf_counter() - self.submitted

    def summary(self, prompt_length: int, reused: int) -> Timings:
        """Return the timings; load_s, which the engine does not know, is 0."""
        prefill_s, decode_s = self._first - self._began, self._last - self._first
        read, decoded = prompt_length - reused, self._count - 1
        return Timings(
            load_s=0.0,
            compile_s=self._clock.compiled_s - self._compiled,
            queue_s=self._waited() if self._queue_s is None else self._queue_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tokens_per_s=read / prefill_s if self._count and prefill_s else None,
            decode_tokens_per_s=decoded / decode_s if decoded > 0 and decode_s else None,
        )
