"""Turns: calls beside each other, or one alone."""

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Lets so many calls run beside each other, or one alone.

    Args:
        calls: the most beside each other.
    """

    def __init__(self, calls: int):
        self._calls, self._turns = calls, threading.Semaphore(calls)
        self._gate = threading.Lock()

    @contextlib.contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn, and have it meanwhile."""
        count = self._calls if alone else 1
        with self._gate:  # who waits to be alone keeps later ones out
            for _ in range(count):
                self._turns.acquire()
        try:
            yield
        finally:
            self._turns.release(count)
