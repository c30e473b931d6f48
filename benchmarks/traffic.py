"""Traffic: when requests come, how long they are and how they go on, from published statistics.

Lengths: BurstGPT's conversations with GPT-4 (arXiv 2401.17644), whose percentiles Llumnix gives
(OSDI 2024, table 1). They fit Llama 2's context. Turns: trace A of Alibaba's Bailian (USENIX ATC
2025), of whose 43,058 requests 19,957 follow an earlier one, after a gap that is log-normal with mu
4.82 and sigma 1.25 (fitted for SAECache). New conversations come at random (Poisson) times.
"""

import bisect
import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Iterator

CONTEXT = 4096
PROMPT = ((0.0, 0.5, 0.8, 0.95, 0.99, 1.0), (1, 582, 1427, 2345, 3549, 3840))
OUTPUT = ((0.0, 0.5, 0.8, 0.95, 0.99, 1.0), (1, 243, 434, 669, 964, 1500))
"""Shares and percentiles, in tokens; their ends are not published. Between them lengths are taken
to be uniform. The means are then 884 and 290; those published are 830 and 271."""
FOLLOW_UPS = 19_957 / 43_058
"""Of all requests, those that go on with a conversation."""
GAP_S = math.exp(4.82)
"""Median seconds from an answer's end to the conversation's next request."""
GAP_SIGMA = 1.25
"""Of the logarithm of the gap."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request of a conversation."""

    prompt: int
    """Its tokens, the conversation so far among them."""
    output: int
    shared: int
    """Tokens of the prompt that were the prompt of the turn before."""
    gap_s: float
    """From its end to the next turn."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What one client asks, turn by turn."""

    number: int
    began: float
    """Seconds at which its first turn here comes."""
    turns: tuple[Turn, ...]


def conversations(
    rate: float, seconds: float, gap_s: float, seed: int = 0
) -> Iterator[Conversation]:
    """Yield conversations in the order in which they begin.

    The traffic has gone on for ever when the time begins: requests that follow one before it come
    too, at the rate at which gaps are still open. Nobody has their beginning.

    Args:
        rate: of requests, a second.
        seconds: in which conversations begin.
        gap_s: median of the gaps.
        seed: of all that is random.
    """
    source = random.Random(seed)
    log_gap, now, number = math.log(gap_s), 0.0, 0
    normal = statistics.NormalDist(log_gap, GAP_SIGMA)
    while (now := now + source.expovariate(rate)) < seconds:
        past = 0
        if source.random() < FOLLOW_UPS:
            if source.random() < normal.cdf(math.log(now)):
                continue  # it follows one that came after the beginning, and comes with that
            past = 1 + _follow_ups(source)
        count = past + 1 + _follow_ups(source)
        # A conversation grows. So its prompts are drawn each for itself, and sorted.
        prompts = [0, *sorted(length(source, PROMPT) for _ in range(count))]
        turns = tuple(
            Turn(
                prompt,
                min(length(source, OUTPUT), CONTEXT - prompt),
                before,
                source.lognormvariate(log_gap, GAP_SIGMA),
            )
            for before, prompt in itertools.pairwise(prompts[past:])
        )
        yield Conversation(number, now, turns)
        number += 1


def _follow_ups(source: random.Random) -> int:
    """Draw how many requests of a conversation follow one of its requests."""
    number = 0
    while source.random() < FOLLOW_UPS:
        number += 1
    return number


def length(source: random.Random, published: tuple[tuple[float, ...], tuple[int, ...]]) -> int:
    """Draw a length, in tokens, of a distribution that is known by some percentiles."""
    shares, values = published
    share = source.random()
    after = bisect.bisect_right(shares, share)
    part = (share - shares[after - 1]) / (shares[after] - shares[after - 1])
    return round(values[after - 1] + part * (values[after] - values[after - 1]))
