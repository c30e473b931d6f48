"""Trial: one way of one choice, and what came of it."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.limits import Limits
from benchmarks.model_cost import Cost, matmul_limit

WARM_UPS = 2
"""Untimed runs before: one compiles, a GPU may record a graph in the next."""
REPEATS = 3
"""Timed runs at least."""


class CannotRunError(Exception):
    """This way is not open here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to be measured."""

    case: dict[str, Any]
    """What is computed; the ways of one case are compared."""
    form: str
    """How."""
    measure: Callable[[], float | dict[str, int]]
    """Returns seconds, or figures that are no times, by name."""
    cost: Cost | None = None
    """The least work that `measure` timed."""
    dtype: str = "float32"
    """Whose rate of products is the limit."""
    tokens: int | None = None
    """How many tokens were drawn or read."""
    foreign: bool = False
    """JAX's own, which may not support the backend: an error is no failure of ours."""

    def run(self, limits: Limits) -> dict[str, Any]:
        """Measure and return the row; whatever goes wrong is in it."""
        try:
            measured = self.measure()
        except CannotRunError as error:
            return self.row(limits, skipped=str(error))
        except Exception as error:  # one way that fails must not end the others' measurement
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self.foreign:
                return self.row(limits, skipped=reason)
            return self.row(limits, failed=reason)
        if isinstance(measured, dict):
            return self.row(limits, amounts=measured)
        return self.row(limits, seconds=measured)

    def row(
        self,
        limits: Limits,
        *,
        seconds: float | None = None,
        amounts: dict[str, int] | None = None,
        skipped: str | None = None,
        failed: str | None = None,
    ) -> dict[str, Any]:
        """Return what JSON and table have of it; every row has the same fields."""
        flops, moved = (self.cost.flops, self.cost.bytes) if self.cost else (None, None)
        limit = self.cost and self.cost.limit_seconds(
            limits.bandwidth, matmul_limit(limits.matmul, self.dtype)
        )

        def per_second(amount: float | None) -> float | None:
            return amount / seconds if amount is not None and seconds else None

        return {
            "case": self.case,
            "form": self.form,
            "seconds": seconds,
            "amounts": amounts,
            "tokens": self.tokens,
            "flops": flops,
            "bytes": moved,
            "limit_s": limit,
            "memory_bound": moved is not None and limit == moved / limits.bandwidth,
            "tokens_per_s": per_second(self.tokens),
            "flop_per_s": per_second(flops),
            "bytes_per_s": per_second(moved),
            "fraction_of_limit": per_second(limit),
            "best": False,
            "skipped": skipped,
            "failed": failed,
        }


def mark_best(rows: list[dict[str, Any]]) -> None:
    """Mark the fastest of each case that was timed in several ways."""
    for case in {str(row["case"]) for row in rows}:
        timed = [row for row in rows if str(row["case"]) == case and row["seconds"]]
        if len(timed) > 1:
            min(timed, key=lambda row: row["seconds"])["best"] = True


def median_seconds(once: Callable[[], float], at_least: float) -> float:
    """Return the median of the seconds that a warm function returns, `at_least` in all."""
    for _ in range(WARM_UPS):
        once()
    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < at_least:
        seconds.append(once())
    return statistics.median(seconds)


def time_call(call: Callable[[], Any], at_least: float, *, parts: int = 1) -> float:
    """Return the median seconds of one of the `parts` of a call that returns arrays.

    Timed runs take `at_least` seconds in all.
    On an accelerator four calls are queued at a time: the host's work for one hides behind another.
    """
    calls = 1 if jax.default_backend() == "cpu" else 4

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        return (time.perf_counter() - began) / calls

    return median_seconds(once, at_least) / parts
