# pyright: reportMissingImports=false
# (httpx and httpx-sse come with the bench extra, which type checks do not need, and are imported
# where they are used: without them a command ends in one line)
"""Put load on a server: prompts, requests over HTTP, closed and open loops, and their figures."""

import asyncio
import dataclasses
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.servers import SPECIAL, Server
from llama_jax.errors import InputError

BURST_S = 0.001
"""Text that arrives within this of the text before belongs to the same burst."""

PER_CLIENT = 16
"""Requests of a closed loop for each client: few clients take long."""
SHARED = 0.75
"""Share of a prompt that is the same in all prompts of the load with a shared prefix."""


def make_prompts(
    vocab_size: int, count: int, length: int, *, shared: bool = False, seed: int = 0
) -> list[list[int]]:
    """Return prompts of random ids, of no common beginning unless `shared`."""
    draw, ids = random.Random(f"{seed} {count} {shared}"), range(len(SPECIAL), vocab_size)
    common = draw.choices(ids, k=round(SHARED * length) if shared else 0)
    return [common + draw.choices(ids, k=length - len(common)) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Point:
    """A load to measure under."""

    kind: str
    """closed: each of some clients waits for its answer; shared: so, with a shared prefix;
    open: requests come at a rate, at random (Poisson) times."""
    amount: float
    """Clients, or requests a second."""
    requests: int

    def __str__(self) -> str:
        if self.kind == "open":
            return f"{self.amount:g} requests/s"
        prefix = ", shared prefix" if self.kind == "shared" else ""
        return f"{self.amount:g} client{'s' * (self.amount != 1)}{prefix}"


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
    prompt_tokens: int | None = None
    """As counted by the server; None: it does not report them."""
    tokens: int = 0
    """As counted by the server; where it does not report them, the characters."""
    finished: bool = False
    error: str | None = None
    """Why it does not count."""

    def bursts(self) -> list[tuple[float, float]]:
        """Return when text came, joined where it came together, and its share of the tokens."""
        bursts: list[tuple[float, int]] = []
        last = -math.inf
        for moment, count in self.texts:
            if moment - last > BURST_S:
                bursts.append((moment, 0))
            bursts[-1] = (bursts[-1][0], bursts[-1][1] + count)
            last = moment
        each = self.tokens / max(1, sum(count for _, count in self.texts))
        return [(moment, count * each) for moment, count in bursts]

    def read(self, event: dict[str, Any]) -> None:
        """Take in an event of the stream that has just arrived."""
        if problem := event.get("error") or event.get("errors"):
            self.error = f"reported in the stream: {str(problem)[:200]}"
        usage = event.get("usage") or {}  # in more than one event, and perhaps of zeros
        if usage.get("completion_tokens"):
            self.prompt_tokens, self.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in event.get("choices", []):
            self.finished = self.finished or choice.get("finish_reason") is not None
            if choice.get("text"):
                self.texts.append((time.perf_counter(), len(choice["text"])))


async def ask(
    client: Any, body: dict[str, Any], timeout_s: float, answer: Answer | None = None
) -> Answer:
    """Send one request by an httpx.AsyncClient and read its answer; errors are in the answer."""
    import httpx
    import httpx_sse

    answer = Answer(time.perf_counter()) if answer is None else answer
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpx_sse.aconnect_sse(client, "POST", "/v1/completions", json=body) as events,
        ):
            if events.response.status_code != 200:
                text = (await events.response.aread()).decode(errors="replace")
                raise ValueError(f"status {events.response.status_code}: {text[:200]}")
            async for event in events.aiter_sse():
                if event.data != "[DONE]":
                    answer.read(json.loads(event.data))
    except TimeoutError:
        answer.error = f"no whole answer within {timeout_s:g} s"
    except (httpx.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    answer.tokens = answer.tokens or sum(count for _, count in answer.texts)
    if answer.error is None and not answer.finished:
        answer.error = "cut off: the stream has no finish_reason"
    return answer


def connect(server: Server) -> Any:
    """Return an httpx.AsyncClient of a server, without limits of its own."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits, trust_env=False)


Ask = Callable[[dict[str, Any], Answer | None], Any]


async def closed_loop(ask: Ask, bodies: Sequence[dict], clients: int) -> list[Answer]:
    """Let clients send requests, each its next one when its last is answered."""
    answers: list[Answer] = []
    waiting = iter(bodies)

    async def client() -> None:
        for body in waiting:
            answers.append(await ask(body, None))

    await asyncio.gather(*(client() for _ in range(min(clients, len(bodies)))))
    return answers


async def open_loop(ask: Ask, bodies: Sequence[dict], offsets: Sequence[float]) -> list[Answer]:
    """Send each request so many seconds from now, whatever became of those before."""
    began = time.perf_counter()

    async def send(body: dict, offset: float) -> Answer:
        due = began + offset
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await ask(body, Answer(due))

    return await asyncio.gather(*itertools.starmap(send, zip(bodies, offsets, strict=True)))


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the seconds at which `count` requests arrive, at `rate` a second on average.

    The first is at 0; the seconds between two are exponential.
    """
    draw = random.Random(seed).expovariate
    return [0.0, *itertools.accumulate(draw(rate) for _ in range(count - 1))]


def drive(
    server: Server,
    point: Point,
    prompts: Sequence[list[int]],
    new_tokens: int,
    timeout_s: float,
    on_answer: Callable[[], object] = lambda: None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Put load on a server; return the answers and their figures."""
    bodies = [server.launch.body(prompt, new_tokens) for prompt in prompts]
    late = [0.0]

    async def run() -> list[Answer]:
        async with connect(server) as client:

            async def send(body: dict, answer: Answer | None) -> Answer:
                if answer is not None:
                    late.append(time.perf_counter() - answer.began)
                answered = await ask(client, body, timeout_s, answer)
                on_answer()
                return answered

            if point.kind == "open":
                return await open_loop(send, bodies, poisson(point.amount, len(bodies), seed=0))
            return await closed_loop(send, bodies, round(point.amount))

    began, own_began = time.perf_counter(), time.process_time()
    answers = asyncio.run(run())
    seconds, own = time.perf_counter() - began, time.process_time() - own_began
    figures = {"latest_send_s": max(late), "client_cores": own / seconds}
    return answers, summarise(answers, seconds) | figures


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Return p50, p99 and the largest: each one of the values; None: there are none.

    The smallest value that such a share of all do not exceed. Of fewer than 100, the 99th
    percentile is the largest.
    """
    ordered = sorted(values)
    ranks = {name: math.ceil(s * len(ordered)) for name, s in (("p50", 0.5), ("p99", 0.99))}
    ranks["max"] = len(ordered)
    return {name: ordered[rank - 1] if ordered else None for name, rank in ranks.items()}


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
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in good),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(good) / seconds,
        "tokens_per_burst": tokens / sum(map(len, bursts)) if any(bursts) else None,
        "first_token_s": spread(s[0][0] - a.began for a, s in zip(good, bursts, strict=True) if s),
        "per_token_s": spread(per_token),
        "per_burst_s": spread(wait for wait, _ in waits),
        "end_to_end_s": spread(answer.ended - answer.began for answer in good),
    }
