"""When requests are sent: a closed loop of clients, or an open one that waits for nobody."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.load.client import Recording

Ask = Callable[[bytes, float | None], Awaitable[Recording]]
"""Send a request that was due at a time (None: now), and return what came back."""


async def closed_loop(ask: Ask, requests: Sequence[bytes], clients: int) -> list[Recording]:
    """Let clients send requests, each its next one when its last is answered."""
    recordings: list[Recording] = []
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            recordings.append(await ask(request, None))

    await asyncio.gather(*(client() for _ in range(min(clients, len(requests)))))
    return recordings


async def open_loop(
    ask: Ask, requests: Sequence[bytes], offsets: Sequence[float]
) -> list[Recording]:
    """Send each request at its time, whatever became of those before.

    Args:
        ask: how to send one.
        requests: in order.
        offsets: seconds from now, one for each.
    """
    began = time.perf_counter()

    async def send(request: bytes, offset: float) -> Recording:
        due = began + offset
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await ask(request, due)

    return await asyncio.gather(*itertools.starmap(send, zip(requests, offsets, strict=True)))


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the seconds at which `count` requests arrive, at `rate` a second on average.

    The first is at 0; the seconds between two are exponential.
    """
    draw = random.Random(seed).expovariate
    return [0.0, *itertools.accumulate(draw(rate) for _ in range(count - 1))]
