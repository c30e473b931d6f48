"""Drive a server with mixed traffic for a long time: `python -m tools.soak --minutes=20`.

Starts a server of the demo model and lets clients of seven kinds loose on it: whole answers,
streams, clients that hang up, errors, huge bodies, slow readers and bursts beyond the queue. It
prints a line a minute and fails if the process grew, a slot was lost, an answer was wrong or any
status was 5xx. Linux only: the process's size is read from /proc.
"""

import asyncio
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx2 as httpx
from absl import app, flags, logging
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.card import MODEL

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKEN = "soak"
SLOTS, QUEUE, CLIENTS = 4, 16, 12
NATIVE = f"/client/v4/accounts/soak/ai/run/{MODEL}"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
DONE = "data: [DONE]"
WORDS = ["the", "sea", "a", "king", "of", "and", "tell", "me", "what", "is", "fox"]
END_S = 60
"""For what runs to end when there is no more traffic."""

_MINUTES = flags.DEFINE_float("minutes", 20, "How long to go on.", lower_bound=0.1)
_SEED = flags.DEFINE_integer("seed", 0, "Decides each client's requests; not how they interleave.")
_WARM_UP = flags.DEFINE_float("warm_up_minutes", 5, "When growth begins to count.")
_GROWTH = flags.DEFINE_float("max_growth_mib", 96, "How much more memory the server may hold.")


class SoakError(Exception):
    """An answer that the server must not give."""


class Server:
    """A server process."""

    def __init__(self, folder: pathlib.Path):
        command = [sys.executable, "run.py", "serve", "--port=0"]
        command += [f"--slots={SLOTS}", f"--max_queue={QUEUE}", f"--api_token={TOKEN}"]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        self.url = self._wait()

    def _wait(self) -> str:
        while self.process.poll() is None:
            if match := re.search(r"at (http://\S+)", self.log.read_text("utf-8")):
                return match[1]
            time.sleep(0.1)
        raise app.Error(f"the server ended: {self.log.read_text('utf-8')}")

    @property
    def rss_mib(self) -> float:
        """The memory that it holds."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match
        return int(match[1]) / 1024

    @property
    def files(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """Tell it to stop; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def connect(url: str) -> httpx.AsyncClient:
    """Return one client's connections to a server."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=300)


class Client:
    """One client, which does one thing after the other.

    Args:
        http: what it calls with.
        rng: decides what it does.
        counts: what it did, by name; shared.
    """

    def __init__(
        self, http: httpx.AsyncClient, rng: random.Random, counts: collections.Counter[str]
    ):
        self._http, self._rng, self._counts = http, rng, counts
        self._kinds: dict[Callable[[], Awaitable[None]], float] = {
            self.whole: 6,
            self.known: 4,
            self.streamed: 6,
            self.cancelled: 6,
            self.given_up: 2,
            self.erroneous: 8,
            self.huge: 1,
            self.slow: 1,
            self.burst: 0.5,
            self.broken_off: 2,
        }

    async def one(self) -> None:
        """Do one thing."""
        [kind] = self._rng.choices(list(self._kinds), list(self._kinds.values()))
        self._counts[kind.__name__] += 1
        try:
            await kind()
        except Exception as error:
            raise SoakError(f"{kind.__name__}: {type(error).__name__}: {error}"[:300]) from error

    async def whole(self) -> None:
        """Ask for something and read it."""
        path, body = self._body()
        self._check(await self._http.post(path, json=body), 200, 429)

    async def known(self) -> None:
        """Ask what has one right answer."""
        body = {"prompt": QUESTION, "temperature": 0}
        response = self._check(await self._http.post(NATIVE, json=body), 200, 429)
        if response.status_code == 200 and response.json()["result"]["response"] != ANSWER:
            raise SoakError(f"a wrong answer: {response.text}")

    async def streamed(self) -> None:
        """Read a stream to its end."""
        async with self._stream(*self._body()) as lines:
            last = ""
            async for line in lines:
                last = line or last
            if last != DONE:
                raise SoakError(f"a stream ended in {last!r}")

    async def cancelled(self) -> None:
        """Hang up in the midst of a stream."""
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
            raise SoakError(f"an error without a text: {response.text}")

    async def huge(self) -> None:
        """Send megabytes."""
        content, status = self._rng.choice(
            [
                (b"x" * (9 << 20), 413),
                (json.dumps({"prompt": "word " * 26_000}).encode(), 413),
                (json.dumps({"prompt": "x" * (7 << 20)}).encode(), 400),
                (json.dumps({"prompt": "x", "a": [[]] * (1 << 20), "max_tokens": 2}).encode(), 200),
            ]
        )
        self._check(await self._http.post(NATIVE, content=content), status, 429)

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
        async with connect(str(self._http.base_url)) as http:
            posts = (http.post(NATIVE, json=body) for _ in range(SLOTS + QUEUE + 10))
            responses = await asyncio.gather(*posts)
        for response in responses:
            self._check(response, 200, 429)
            if response.status_code == 429 and not int(response.headers["retry-after"]) > 0:
                raise SoakError("a 429 without Retry-After")

    async def broken_off(self) -> None:
        """Connect, send a part of a request, and hang up."""
        request = (
            f"POST {NATIVE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
            'content-length: 60\r\n\r\n{"prompt": "x'
        ).encode()
        url = self._http.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(request[: self._rng.randrange(len(request))])
        await writer.drain()
        writer.close()

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
            raise SoakError(
                f"{response.status_code} for {request.method} {request.url.path}, "
                f"expected {' or '.join(map(str, allowed))}"
            )
        return response


async def _ended() -> AsyncIterator[str]:
    yield DONE


async def read_metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Return each metric's value, summed over its labels; statuses also by their first digit."""
    values: collections.defaultdict[str, float] = collections.defaultdict(float)
    response = await http.get("/metrics")
    for family in text_string_to_metric_families(response.raise_for_status().text):
        for sample in family.samples:
            values[sample.name.removeprefix("llama_jax:")] += sample.value
            if sample.name.endswith("http_requests_total"):
                values[f"{sample.labels['status'][0]}xx"] += sample.value
    return values


class Soak:
    """The whole run.

    Args:
        server: what is driven.
    """

    def __init__(self, server: Server):
        self._server = server
        self._began = time.monotonic()
        self._end = self._began + _MINUTES.value * 60
        self._counts: collections.Counter[str] = collections.Counter()
        self._warm: tuple[float, int] | None = None
        """Memory and open files when the server was warm."""
        self.problems: list[str] = []

    async def run(self) -> None:
        """Drive it, then look at what is left."""
        async with connect(self._server.url) as http:
            await asyncio.gather(self._watch(http), *map(self._client, range(CLIENTS)))
            await self._check_end(http)
        print("done:", json.dumps(dict(sorted(self._counts.items()))))

    async def _client(self, number: int) -> None:
        rng = random.Random(_SEED.value * CLIENTS + number)
        async with connect(self._server.url) as http:
            client = Client(http, rng, self._counts)
            while time.monotonic() < self._end:
                try:
                    await client.one()
                except SoakError as error:
                    if self._server.process.poll() is not None:
                        return  # which is told once, elsewhere
                    if str(error) not in self.problems:
                        print(error, file=sys.stderr, flush=True)
                    self.problems.append(str(error))
                    await asyncio.sleep(0.1)

    async def _watch(self, http: httpx.AsyncClient) -> None:
        minute = 0
        while (now := time.monotonic()) < self._end:
            if now - self._began >= minute * 60:
                await self._report(http, minute)
                minute += 1
            if self._warm is None and now - self._began >= _WARM_UP.value * 60:
                self._warm = self._server.rss_mib, self._server.files
            if self._server.process.poll() is not None:
                self.problems.append(f"the server ended with {self._server.process.returncode}")
                return
            await asyncio.sleep(0.5)

    async def _report(self, http: httpx.AsyncClient, minute: float) -> dict[str, float]:
        got = await read_metrics(http)
        print(
            f"minute {minute:g}: rss {self._server.rss_mib:.0f} MiB, files {self._server.files}, "
            f"slots {got['num_requests_running']:g}, queue {got['num_requests_waiting']:g}, "
            f"requests {got['http_requests_total']:g} "
            f"(2xx {got['2xx']:g}, 4xx {got['4xx']:g}, 5xx {got['5xx']:g}, "
            f"hung up {got['client_disconnects_total']:g}), "
            f"tokens {got['generation_tokens_total']:g}, problems {len(self.problems)}",
            flush=True,
        )
        return got

    async def _check_end(self, http: httpx.AsyncClient) -> None:
        """Wait until nothing runs; see that every slot can still be had, and what it all cost."""
        deadline = time.monotonic() + END_S
        while (got := await read_metrics(http))["num_requests_running"]:
            if time.monotonic() > deadline:
                self.problems.append(f"{got['num_requests_running']:g} slots are never free")
                break
            await asyncio.sleep(0.1)
        got = await self._report(http, _MINUTES.value)
        for name in ("num_requests_running", "num_requests_waiting", "5xx"):
            if got[name]:
                self.problems.append(f"{name} is {got[name]:g} in the end")
        if (slots := await self._slots_at_once(http)) != SLOTS:
            self.problems.append(f"{slots} of {SLOTS} slots are left")
        if self._warm is None:
            return  # the server ended before
        growth, files = self._server.rss_mib - self._warm[0], self._server.files - self._warm[1]
        print(f"growth since minute {_WARM_UP.value:g}: {growth:.1f} MiB, {files} files")
        if growth > _GROWTH.value:
            self.problems.append(f"the server grew by {growth:.0f} MiB")
        if files > 0:  # there was traffic then, and now there is none
            self.problems.append(f"{files} more files are open than amid the traffic")

    async def _slots_at_once(self, http: httpx.AsyncClient) -> int:
        """Return how many requests run at once if there are more than slots."""
        body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True}
        posts = [
            asyncio.create_task(http.post(COMPLETIONS, json=body | {"temperature": 5}))
            for _ in range(SLOTS + 2)
        ]
        most = 0
        while not all(post.done() for post in posts):
            most = max(most, int((await read_metrics(http))["num_requests_running"]))
            await asyncio.sleep(0.02)
        await asyncio.gather(*posts)
        return most


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Start a server, and see to it that it ends."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(pathlib.Path(folder))
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def main(_: list[str]) -> None:
    """Soak, and fail if anything was wrong."""
    if _MINUTES.value <= _WARM_UP.value:
        raise app.UsageError("--minutes is to be more than --warm_up_minutes, where growth begins")
    logging.set_verbosity(logging.WARNING)  # httpx tells of every request
    with serving() as server:
        soak = Soak(server)
        asyncio.run(soak.run())
        if server.process.poll() is None and (status := server.stop()) != 0:
            soak.problems.append(f"the exit status is {status}")
        log = server.log.read_text("utf-8", errors="replace")
        if "Traceback" in log:
            soak.problems.append("a traceback in the log: " + log[log.index("Traceback") :][:3000])
    for problem, times in collections.Counter(soak.problems).most_common(20):
        print(f"{times} x {problem}", file=sys.stderr)
    if soak.problems:
        sys.exit(1)
    print("no problems")


if __name__ == "__main__":
    app.run(main)
