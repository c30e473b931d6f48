"""What running streams notice of a long prompt that is let in beside them.

All slots but one draw long answers. A turn of the engine's that reads a piece of the new prompt
makes each of them wait longer for its next burst: by how much, against their waits before.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.load.answer import Answer, read_answer
from benchmarks.load.client import Connection, Recording, ask, connect
from benchmarks.load.prompts import Prompts
from benchmarks.load.server import Server
from benchmarks.load.stats import percentile, spread
from benchmarks.worker import EngineError

ADMISSIONS = 3
"""Long prompts, one after the other."""
IDLE_BURSTS = 8
"""Bursts of each stream before the first of them, and after each."""
STREAM_PROMPT = 16

Gap = tuple[float, float]
"""When a wait began and when it ended."""


def context_needed(long_prompt: int, longest: int) -> int:
    """Return the context that a slot needs, of at most `longest` tokens.

    Streams should outlast the long prompts.
    """
    return min(longest, max(2 * long_prompt, long_prompt + 1024))


def measure_gap(server: Server, long_prompt: int, timeout_s: float) -> dict[str, Any]:
    """Return how long streams wait for bursts, in seconds: otherwise, and while a prompt is read.

    Args:
        server: with two slots at least.
        long_prompt: tokens of the prompt that comes in.
        timeout_s: for all of it.

    Raises:
        TimeoutError: it took longer.
        EngineError: a request failed, or there was no room for long streams.
    """
    return asyncio.run(_measure(server, long_prompt, timeout_s))


async def _measure(server: Server, long_prompt: int, timeout_s: float) -> dict[str, Any]:
    launch = server.launch
    prompts = Prompts(launch.config.vocab_size, seed=1)
    length = launch.context - STREAM_PROMPT
    admitted = [server.encode(p) for p in prompts.make(ADMISSIONS, long_prompt, 1)]
    streams: list[Connection] = []
    admissions: list[Answer] = []
    try:
        async with asyncio.timeout(timeout_s):
            for prompt in prompts.make(launch.slots - 1, STREAM_PROMPT, length):
                streams.append(await connect(server.port, server.encode(prompt)))
            await _wait_for_bursts(streams)
            steady = time.perf_counter()
            await _wait_for_bursts(streams)
            for request in admitted:
                recording = await ask(server.port, request, timeout_s=timeout_s)
                admissions.append(read_answer(recording))
                await _wait_for_bursts(streams)
    finally:
        for stream in streams:
            stream.abort()
    answers = [read_answer(Recording(steady, stream.arrivals)) for stream in streams]
    failed = [a.error for a in admissions if a.error] + [a.error for a in answers if not a.bursts]
    if failed:
        raise EngineError(f"{launch}: {failed[0]}")
    ended = min((a.ended for a in answers if a.error is None), default=time.perf_counter())
    figures = compare(_gaps(answers), steady, ended, [(a.began, a.ended) for a in admissions])
    if figures["max_ratio"] is None:
        raise EngineError(f"{launch}: streams ended too soon, the context is too short for --gap")
    return figures | {"streams": len(streams), "long_prompt": long_prompt}


def compare(
    gaps: Sequence[Gap], steady: float, ended: float, admissions: Sequence[Gap]
) -> dict[str, Any]:
    """Return the figures of waits during admissions, and otherwise.

    Args:
        gaps: of all streams.
        steady: those that begin before do not count: not all streams were there yet.
        ended: nor do those that end later, as one was gone.
        admissions: from a long prompt's request to its answer.
    """
    counted = [(b, e) for b, e in gaps if b >= steady and e <= ended]
    during = {gap for gap in counted if any(gap[0] < e and gap[1] > b for b, e in admissions)}
    idle = spread([e - b for b, e in counted if (b, e) not in during])
    beside = spread([e - b for b, e in counted if (b, e) in during])
    base = idle["p50"]
    return {
        "idle_s": idle,
        "during_s": beside,
        "p99_ratio": beside["p99"] / base if base and beside["p99"] else None,
        "max_ratio": beside["max"] / base if base and beside["max"] else None,
        "first_token_s": percentile([e - b for b, e in admissions], 0.5),
        "admissions": [[b - steady, e - steady] for b, e in admissions],
        "gaps": sorted([b - steady, e - b] for b, e in counted),
    }


def _gaps(answers: Sequence[Answer]) -> list[Gap]:
    return [(burst.time - gap, burst.time) for answer in answers for gap, burst in answer.gaps]


async def _wait_for_bursts(streams: Sequence[Connection]) -> None:
    """Wait until each stream has got some more, or has ended."""
    targets = [stream.bursts + IDLE_BURSTS for stream in streams]
    while any(
        stream.bursts < target and not stream.closed.done()
        for stream, target in zip(streams, targets, strict=True)
    ):
        await asyncio.sleep(0.002)
