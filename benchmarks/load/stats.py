"""From answers to the figures of one point."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.load.answer import Answer


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return the smallest value that `share` of all do not exceed; None: there are no values.

    One of the values, never one in between. Of fewer than 100, the 99th percentile is the largest.
    """
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered))) - 1] if ordered else None


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return p50, p99 and the largest, of those that there are."""
    there = [value for value in values if value is not None]
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: percentile(there, share) for name, share in shares.items()}


def summarise(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return the figures of one round at one point; seconds, and tokens a second.

    `per_burst_s` is the time between two bursts of a stream; `per_token_s` the same for every
    token, where a burst's tokens share the time that it was waited for.

    Args:
        answers: failed ones too; they are counted, and in no other figure.
        seconds: from the first request to the last answer.
    """
    good = [answer for answer in answers if answer.error is None]
    gaps = [gap for answer in good for gap in answer.gaps]
    tokens = sum(answer.tokens for answer in good)
    bursts = sum(len(answer.bursts) for answer in good)
    per_token = [gap / b.tokens for gap, b in gaps for _ in range(max(1, round(b.tokens)))]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "seconds": seconds,
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in good),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(good) / seconds,
        "tokens_per_burst": tokens / bursts if bursts else None,
        "first_token_s": spread([answer.first_token_s for answer in good]),
        "per_token_s": spread(per_token),
        "per_burst_s": spread([gap for gap, _ in gaps]),
        "end_to_end_s": spread([answer.ended - answer.began for answer in good]),
    }
