"""Put the load of one point on a server."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.load.answer import Answer, read_answer
from benchmarks.load.arrivals import closed_loop, open_loop, poisson
from benchmarks.load.client import Recording, ask
from benchmarks.load.points import Point
from benchmarks.load.prompts import Prompt
from benchmarks.load.server import Server
from benchmarks.load.stats import summarise


def drive(
    server: Server,
    point: Point,
    prompts: Sequence[Prompt],
    *,
    rate: float | None,
    timeout_s: float,
    seed: int,
    on_answer: Callable[[], object] = lambda: None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Return the answers, and the figures of `summarise` with those of the processes.

    Args:
        server: that answers.
        point: its kind and clients.
        prompts: as many as it has requests.
        rate: requests a second of an open loop; None: a closed one.
        timeout_s: of one request.
        seed: of the times at which an open loop sends.
        on_answer: called after each.
    """
    requests = [server.encode(prompt) for prompt in prompts]
    late = [0.0]

    async def send(request: bytes, due: float | None) -> Recording:
        if due is not None:
            late.append(time.perf_counter() - due)
        recording = await ask(server.port, request, timeout_s=timeout_s, due=due)
        on_answer()
        return recording

    if rate is None:
        load = closed_loop(send, requests, round(point.amount))
    else:
        load = open_loop(send, requests, poisson(rate, len(requests), seed))
    before = server.cpu_s()
    began, own_began = time.perf_counter(), time.process_time()
    recordings = asyncio.run(load)
    seconds, own = time.perf_counter() - began, time.process_time() - own_began
    after = server.cpu_s()
    answers = [read_answer(recording) for recording in recordings]
    return answers, summarise(answers, seconds) | {
        "rate": rate,
        "latest_send_s": max(late),
        "client_cores": own / seconds,
        "server_cores": None if before is None or after is None else (after - before) / seconds,
    }
