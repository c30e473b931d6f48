"""Drive a server with mixed traffic for a long time: `python -m tools.soak --minutes=20`.

Starts a server of the demo model and lets the clients of tools/traffic.py loose on it. It prints a
line a minute and fails if the process grew, a slot was lost, an answer was wrong or any status was
5xx. Linux only: the process's size is read from /proc.
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
from collections.abc import Iterator

import httpx2 as httpx
from absl import app, flags, logging
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.card.schemas import MODEL
from tools.traffic import COMPLETIONS, TOKEN, Client, WrongAnswerError, connect

ROOT = pathlib.Path(__file__).resolve().parent.parent
SLOTS, QUEUE, CLIENTS = 4, 16, 12
END_S = 60
"""For what runs to end when there is no more traffic."""

_MINUTES = flags.DEFINE_float("minutes", 20, "How long to go on.", lower_bound=0.1)
_SEED = flags.DEFINE_integer("seed", 0, "Decides each client's requests; not how they interleave.")
_WARM_UP = flags.DEFINE_float("warm_up_minutes", 5, "When growth begins to count.")
_GROWTH = flags.DEFINE_float("max_growth_mib", 96, "How much more memory the server may hold.")


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


async def read_metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Return each metric's value, summed over its labels; statuses also by their first digit."""
    values: collections.defaultdict[str, float] = collections.defaultdict(float)
    response = await http.get("/metrics")
    for family in text_string_to_metric_families(response.raise_for_status().text):
        for sample in family.samples:
            values[sample.name.removeprefix("llama_jax_")] += sample.value
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
            client = Client(http, rng, self._counts, SLOTS + QUEUE)
            while time.monotonic() < self._end:
                try:
                    await client.one()
                except WrongAnswerError as error:
                    if self._server.process.poll() is not None:
                        return  # which is reported once, elsewhere
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
            f"disconnected {got['client_disconnects_total']:g}), "
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
