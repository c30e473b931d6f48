# pyright: reportMissingImports=false
# (httpx and httpx-sse come with the bench extra, which type checks do not need, and are imported
# where they are used: without them a command ends in one line)
"""Put load on a server: prompts, requests over HTTP, closed and open loops, and their figures."""

import asyncio
import dataclasses
import itertools
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.engines.protocol import SPECIAL
from benchmarks.servers import Server
from llama_jax.errors import InputError

TIMEOUT_S = 600.0
"""Seconds for one answer; then it failed."""
BURST_S = 0.001
"""Text that arrives within this of the text before belongs to the same burst."""

PER_CLIENT = 16
"""Requests of a closed loop for each client: few clients take long."""
SHARED = 0.75
"""Share of a prompt that is the same in all prompts of the load with a shared prefix."""

Rounds = list[dict[str, Any] | None]
"""Figures by round; None where it failed."""


def make_prompts(
    vocab_size: int, count: int, length: int, *, shared: bool = False, seed: int | str = 0
) -> list[list[int]]:
    """Return prompts of random ids, of no common beginning unless `shared`; others by each seed."""
    draw, ids = random.Random(f"{seed} {count} {shared}"), range(len(SPECIAL), vocab_size)
    common = draw.choices(ids, k=round(SHARED * length) if shared else 0)
    return [common + draw.choices(ids, k=length - len(common)) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Point:
    """A load to measure under."""

    kind: str
    """closed: each of some clients waits for its answer; shared: so, with a shared prefix;
    open: requests come at a rate, at random (Poisson) times; batch: all at once, no server."""
    amount: float
    """Clients, or requests a second."""
    requests: int

    def __str__(self) -> str:
        if self.kind == "open":
            return f"{self.amount:g} requests/s"
        ending = {"shared": ", shared prefix", "batch": " as one batch"}.get(self.kind, "")
        return f"{self.amount:g} client{'s' * (self.amount != 1)}{ending}"


Prompts = dict[Point, list[list[int]]]
"""By load, as ids of tokens."""


def prompts_of(points: Iterable[Point], vocab_size: int, length: int) -> Prompts:
    """Return the prompts of each load. None has those of another: servers keep what they read."""
    return {
        point: make_prompts(
            vocab_size, point.requests, length, shared=point.kind == "shared", seed=str(point)
        )
        for point in points
    }


def make_points(
    clients: list[int], rates: list[str], requests: int, *, shared: bool
) -> list[Point]:
    """Return the loads; the shared prefix is measured at the most clients."""
    if not clients:
        raise InputError("--clients is empty, expected whole numbers from 1 on")
    points = [Point("closed", n, min(requests, PER_CLIENT * n)) for n in clients]
    for text in rates:
        if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
            raise InputError(f"--rate has {text!r}, expected requests a second")
        points.append(Point("open", float(text), requests))
    return points + ([Point("shared", clients[-1], requests)] if shared else [])


@dataclasses.dataclass
class Answer:
    """What one request got; times are of `time.perf_counter`."""

    began: float
    """When the request was due: one that is sent late has waited already."""
    ended: float = 0.0
    texts: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """When text arrived, and its characters."""
    prompt_tokens: int = 0
    """As counted by the server; 0: it does not report them."""
    tokens: int = 0
    """As counted by the server; where it does not report them, the characters."""
    finished: bool = False
    error: str | None = None
    """Why it does not count."""

    def bursts(self) -> list[tuple[float, float]]:
        """Return when text came, joined where it came together, and its share of the tokens."""
        each = self.tokens / max(1, sum(count for _, count in self.texts))
        bursts: list[tuple[float, float]] = []
        last = float("-inf")
        for moment, count in self.texts:
            begun, tokens = bursts.pop() if moment - last <= BURST_S else (moment, 0.0)
            bursts.append((begun, tokens + count * each))
            last = moment
        return bursts

    def read(self, event: dict[str, Any]) -> None:
        """Take in an event of the stream that has just arrived; ValueError: it reports one."""
        if problem := event.get("error") or event.get("errors"):
            raise ValueError(f"reported in the stream: {str(problem)[:200]}")
        usage = event.get("usage") or {}  # in more than one event, and perhaps of zeros
        if usage.get("completion_tokens"):
            self.prompt_tokens, self.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in event.get("choices", []):
            self.finished = self.finished or choice.get("finish_reason") is not None
            if choice.get("text"):
                self.texts.append((time.perf_counter(), len(choice["text"])))


async def ask(client: Any, body: dict[str, Any], answer: Answer) -> None:
    """Send one request by an httpx.AsyncClient and read its answer; errors are in the answer."""
    import httpx
    import httpx_sse

    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx_sse.aconnect_sse(client, "POST", "/v1/completions", json=body) as events,
        ):
            if events.response.status_code != 200:
                text = (await events.response.aread()).decode(errors="replace")
                raise ValueError(f"status {events.response.status_code}: {text[:200]}")
            async for event in events.aiter_sse():
                if event.data != "[DONE]":
                    answer.read(json.loads(event.data))
        if not answer.finished:
            raise ValueError("cut off: the stream has no finish_reason")
    except TimeoutError:
        answer.error = f"no whole answer within {TIMEOUT_S:g} s"
    except (httpx.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    answer.tokens = answer.tokens or sum(count for _, count in answer.texts)


def connect(server: Server) -> Any:
    """Return an httpx.AsyncClient of a server, without limits of its own."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits, trust_env=False)


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the seconds at which `count` requests arrive, at `rate` a second on average.

    The first is at 0; the seconds between two are exponential.
    """
    draw = random.Random(seed).expovariate
    return [0.0, *itertools.accumulate(draw(rate) for _ in range(count - 1))]


async def _send_all(
    server: Server, point: Point, bodies: Sequence[dict], on_answer: Callable[[], object]
) -> list[Answer]:
    """Send requests as a load says; return their answers.

    In a closed loop, each of some clients sends its next request when its last is answered.
    """
    is_open, count = point.kind == "open", len(bodies)
    offsets = poisson(point.amount, count, seed=0) if is_open else [0.0] * count
    clients = asyncio.Semaphore(count if is_open else round(point.amount))
    began = time.perf_counter()

    async def send(client: Any, body: dict, offset: float) -> Answer:
        due = began + offset
        await asyncio.sleep(due - time.perf_counter())
        async with clients:
            answer = Answer(due if is_open else time.perf_counter())
            await ask(client, body, answer)
        on_answer()
        return answer

    async with connect(server) as client:
        waiting = zip(bodies, offsets, strict=True)
        return await asyncio.gather(*(send(client, *request) for request in waiting))


def drive(
    server: Server,
    point: Point,
    prompts: Sequence[list[int]],
    new_tokens: int,
    on_answer: Callable[[], object] = lambda: None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Put load on a server; return the answers and their figures."""
    bodies = [server.launch.body(prompt, new_tokens) for prompt in prompts]
    began, own_began = time.perf_counter(), time.process_time()
    answers = asyncio.run(_send_all(server, point, bodies, on_answer))
    seconds, own = time.perf_counter() - began, time.process_time() - own_began
    return answers, summarise(answers, seconds) | {"client_cores": own / seconds}


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Return p50, p99 and the largest: each one of the values; None: there are none.

    The smallest value that such a share of all do not exceed. Of fewer than 100, the 99th
    percentile is the largest.
    """
    given, names = list(values), ("p50", "p99", "max")
    if not given:
        return dict.fromkeys(names)
    found = np.percentile(given, (50, 99, 100), method="inverted_cdf")
    return dict(zip(names, found.tolist(), strict=True))


def summarise(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return the figures of one load; seconds, and tokens a second.

    `per_burst_s` is the time between two bursts of a stream; `per_token_s` the same for every
    token: the tokens of a burst share the time it was waited for.
    """
    good = [answer for answer in answers if answer.error is None]
    bursts = [answer.bursts() for answer in good]
    waits = [(b[0] - a[0], b[1]) for stream in bursts for a, b in itertools.pairwise(stream)]
    tokens = sum(answer.tokens for answer in good)
    per_token = [wait / count for wait, count in waits for _ in range(max(1, round(count)))]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "seconds": seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "first_token_s": spread(s[0][0] - a.began for a, s in zip(good, bursts, strict=True) if s),
        "per_token_s": spread(per_token),
        "per_burst_s": spread(wait for wait, _ in waits),
        "end_to_end_s": spread(answer.ended - answer.began for answer in good),
    }


def median(values: Rounds) -> Any:
    """Return the median of each figure of some rounds; of what is absent in all, None."""
    there: list[Any] = [value for value in values if value is not None]
    if there and isinstance(there[0], dict):
        names = [name for name, value in there[0].items() if not isinstance(value, list)]
        return {name: median([value.get(name) for value in there]) for name in names}
    return statistics.median(there) if there else None
