"""The well-behaved clients, which ask, stream, disconnect, err and send much; a greedy one."""

import asyncio
import collections
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2 as httpx

from llama_jax.card.schemas import MODEL
from tools.soak.acts import Acts
from tools.soak.answers import CHAT, COMPLETIONS, NATIVE, Known, WrongAnswerError
from tools.soak.server import TOKEN

DONE = "data: [DONE]"
WORDS = ["the", "sea", "a", "king", "of", "and", "tell", "me", "what", "is", "fox"]
GREED, BURST = 64, 40
"""Requests that the greedy client has in flight; those of a burst."""
REUSE_S = 0.5
"""For which an idle connection is used again: the server may close older ones to make room."""
HUGE = [
    (b"x" * (9 << 20), 413),
    (json.dumps({"prompt": "word " * 26_000}).encode(), 413),
    (json.dumps({"prompt": "x" * (7 << 20)}).encode(), 400),
    (json.dumps({"prompt": "x", "a": [[]] * (1 << 20), "max_tokens": 2}).encode(), 400),
]
"""Bodies of megabytes, and the statuses of their answers."""


def connect(url: str, address: str = "127.0.0.1") -> httpx.AsyncClient:
    """Return one client's connections to a server, from an address of its own."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    limits = httpx.Limits(keepalive_expiry=REUSE_S)
    transport = httpx.AsyncHTTPTransport(limits=limits, local_address=address)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=300, transport=transport)


async def be_greedy(http: httpx.AsyncClient, counts: collections.Counter[str]) -> None:
    """Keep GREED requests for long answers in flight, until cancelled."""
    body = {"model": MODEL, "prompt": "The", "max_tokens": 400, "ignore_eos": True}

    async def one() -> None:
        while True:
            try:
                response = await http.post(COMPLETIONS, json=body)
            except httpx.TransportError:
                counts["greedy: reset"] += 1  # a crowd pushed its new connection out
                continue
            counts[f"greedy: {response.status_code}"] += 1
            if response.status_code != 200:
                await asyncio.sleep(float(response.headers["retry-after"]))

    await asyncio.gather(*(one() for _ in range(GREED)))


class Client:
    """One client, which does one thing after the other.

    Args:
        url: the server's.
        address: its own.
        known: requests whose answers are known.
        rng: decides what it does.
        counts: what it did, by name; shared.
    """

    def __init__(
        self,
        url: str,
        address: str,
        known: list[Known],
        rng: random.Random,
        counts: collections.Counter[str],
    ):
        self._url, self._address, self._known = url, address, known
        self._http, self._rng, self._counts = connect(url, address), rng, counts
        weights: dict[Callable[[], Awaitable[None]], float] = {
            self.whole: 6,
            self.known: 12,
            self.streamed: 6,
            self.cancelled: 6,
            self.given_up: 2,
            self.erroneous: 8,
            self.huge: 1,
            self.slow: 1,
            self.burst: 0.5,
        }
        self.acts = Acts(weights, rng, counts)

    async def whole(self) -> None:
        """Ask for something and read it."""
        path, body = self._body()
        self._check(await self._http.post(path, json=body), 200, 429)

    async def known(self) -> None:
        """Ask what has one right answer."""
        known = self._rng.choice(self._known)
        response = await self._http.post(known.path, json=known.body)
        if self._check(response, known.status, 429).status_code != 429:
            known.check(response.status_code, response.content)

    async def streamed(self) -> None:
        """Read a stream to its end."""
        async with self._stream(*self._body()) as lines:
            last = ""
            async for line in lines:
                last = line or last
            if last != DONE:
                raise WrongAnswerError(f"a stream ended in {last!r}")

    async def cancelled(self) -> None:
        """Disconnect in the midst of a stream."""
        path, body = self._body()
        async with self._stream(path, body | {"max_tokens": 300}) as lines:
            left = self._rng.randrange(20)
            async for _ in lines:
                left -= 1
                if left < 0:
                    return

    async def given_up(self) -> None:
        """Hang up before a whole answer is there."""
        path, body = self._body()
        with contextlib.suppress(httpx.TimeoutException):
            wait = self._rng.uniform(0.001, 0.3)
            await self._http.post(path, json=body | {"max_tokens": 300}, timeout=wait)

    async def erroneous(self) -> None:
        """Ask for what there is not."""
        rng, bad = self._rng, {"authorization": "Bearer wrong"}
        path, content, headers, status = rng.choice(
            [
                (NATIVE, rng.randbytes(rng.randrange(1000)), {}, 400),
                (NATIVE, b"[" * rng.randrange(1, 5000), {}, 400),
                (NATIVE, b'{"prompt": "x", "temperature": 9}', {}, 400),
                (NATIVE, b'{"prompt": "x", "max_tokens": 5000}', {}, 413),
                (NATIVE, b'{"prompt": "x"}', bad, 401),
                (NATIVE[:-1], b'{"prompt": "x"}', {}, 400),
                (CHAT, json.dumps({"model": MODEL, "messages": [{"role": "x"}]}).encode(), {}, 400),
                (CHAT, json.dumps({"model": MODEL, "prompt": "x", "n": 99}).encode(), {}, 400),
                (COMPLETIONS, json.dumps({"model": MODEL, "prompt": [[]]}).encode(), {}, 400),
                ("/v1/nothing", b"", {}, 404),
                ("/v1/models", b"", {}, 405),
            ]
        )
        response = await self._http.post(path, content=content, headers=headers)
        self._check(response, status)
        if not response.json()["errors"][0]["message"]:
            raise WrongAnswerError(f"an error without a text: {response.text}")

    async def huge(self) -> None:
        """Send megabytes; beside those of too many others they get 503."""
        content, status = self._rng.choice(HUGE)
        self._check(await self._http.post(NATIVE, content=content), status, 429, 503)

    async def slow(self) -> None:
        """Read a long stream in sips."""
        path, body = self._body()
        async with self._stream(path, body | {"max_tokens": 300}) as lines:
            sips = 20
            async for _ in lines:
                if sips:
                    sips -= 1
                    await asyncio.sleep(0.2)

    async def burst(self) -> None:
        """Ask for more at once than there is room for."""
        body = {"prompt": "x", "max_tokens": 5}
        async with connect(self._url, self._address) as http:
            posts = (http.post(NATIVE, json=body) for _ in range(BURST))
            responses = await asyncio.gather(*posts)
        for response in responses:
            self._check(response, 200, 429)
            if response.status_code == 429 and not int(response.headers["retry-after"]) > 0:
                raise WrongAnswerError("a 429 without Retry-After")

    def _body(self) -> tuple[str, dict[str, Any]]:
        """Return a path, and a body that is right for it."""
        rng = self._rng
        words = " ".join(rng.choices(WORDS, k=8))
        body: dict[str, Any] = {"max_tokens": rng.randrange(60), "temperature": rng.uniform(0, 5)}
        if rng.random() < 0.5:
            body |= {
                "top_p": rng.random(),
                "top_k": rng.randrange(1, 50),
                "seed": 1 + rng.getrandbits(30),
            }
        path = rng.choice([NATIVE, CHAT, COMPLETIONS])
        if path == NATIVE:
            return path, body | {"prompt": words}
        body |= {"model": MODEL, "n": rng.choice([1, 1, 1, 3]), "stop": ["qu", "\n\n"]}
        if path == COMPLETIONS:
            ids = [1, *(rng.randrange(3, 1000) for _ in range(rng.randrange(1, 90)))]
            echo = {"prompt": ids, "logprobs": 3, "echo": True}
            return path, body | rng.choice([{"prompt": words}, echo])
        system = {"role": "system", "content": "Be brief. " * rng.randrange(1, 8)}
        return path, body | {"messages": [system, {"role": "user", "content": words}]}

    @contextlib.asynccontextmanager
    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """Begin a stream; of one that a full queue refuses there is the last line alone."""
        if "echo" in body:
            body = {name: value for name, value in body.items() if name != "logprobs"}
        async with self._http.stream("POST", path, json=body | {"stream": True}) as response:
            if response.status_code == 429:
                self._check(response, 429)
                yield _ended()
            else:
                self._check(response, 200)
                yield response.aiter_lines()

    def _check(self, response: httpx.Response, *allowed: int) -> httpx.Response:
        self._counts[str(response.status_code)] += 1
        if response.status_code not in allowed:
            request = response.request
            raise WrongAnswerError(
                f"{response.status_code} for {request.method} {request.url.path}, "
                f"expected {' or '.join(map(str, allowed))}"
            )
        return response


async def _ended() -> AsyncIterator[str]:
    yield DONE
