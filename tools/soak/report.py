"""The soak's figures, and which of them are out of bounds."""

import os
import time

import numpy as np

from tools.soak.observer import HEALTH_KEPT, HEALTH_NEW, LATE, POLITE, Seen
from tools.soak.server import DESCRIPTORS

MAX_HEALTH_S = 0.1
MAX_RATIO = 3
"""The polite client's 99th percentile beside the others, by that alone."""


class Report:
    """What a run measured.

    Args:
        began: when the load began, on `time.monotonic`.
    """

    def __init__(self, began: float):
        self._began = began
        self.problems: list[str] = []
        self.late: list[float] = []
        """Seconds by which the load's own event loop was late."""
        self.cpu_s = (0.0, 0.0)
        """Of the server and of the load, while the load lasted."""
        self.files = 0
        """The most that the server had open."""
        self._rows: list[tuple[str, np.ndarray]] = []
        self._observer_cpu_s = 0.0
        self._seconds = 0.0

    def add_seen(self, seen: Seen) -> None:
        """Add what the observer saw; note what was too slow."""
        self.problems += seen.problems
        self._seconds = time.monotonic() - self._began
        self._observer_cpu_s = seen.cpu_s
        for name in (HEALTH_NEW, HEALTH_KEPT, POLITE, LATE):
            times, seconds = np.array(seen.latencies[name]).reshape(-1, 2).T
            alone = seconds[times + seconds < self._began]
            crowded = seconds[times >= self._began]
            self._rows += [(f"{name}, alone", alone), (name, crowded)]
            if not (len(alone) and len(crowded)):
                self.problems.append(f"{name}: nothing was measured")
                continue
            p99_alone, p99 = np.percentile(alone, 99), np.percentile(crowded, 99)
            if name in (HEALTH_NEW, HEALTH_KEPT) and p99 >= MAX_HEALTH_S:
                problem = f"{p99 * 1000:.1f} ms, expected < {MAX_HEALTH_S * 1000:g} ms"
                self.problems.append(f"{name}: p99 is {problem}")
            if name == POLITE and p99 > MAX_RATIO * p99_alone:
                problem = f"{p99 / p99_alone:.1f} times that alone, expected <= {MAX_RATIO}"
                self.problems.append(f"{name}: p99 is {problem}")

    def print(self) -> None:
        """Print all figures."""
        print(f"\n{'':36}{'n':>7}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
        rows = [*self._rows, ("load's event loop late", np.array(self.late))]
        for name, seconds in rows:
            if len(seconds):
                p50, p99 = np.percentile(seconds, [50, 99]) * 1000
                most = seconds.max() * 1000
                print(f"{name:36}{len(seconds):7}{p50:10.1f}{p99:10.1f}{most:10.1f}")
        server, load = (cpu_s / max(self._seconds, 1e-9) for cpu_s in self.cpu_s)
        print(f"cores used: server {server:.2f}, load {load:.2f}; ", end="")
        print(f"the observer {self._observer_cpu_s:.1f} s in all")
        average = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"{average}, what else runs here included")
        print(f"descriptors at most: {self.files} of {DESCRIPTORS}")
