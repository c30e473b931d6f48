"""Drive a server with mixed and hostile traffic for a long time: `python -m tools.soak`.

Starts a server of the demo model with 256 descriptors. An observer (observer.py) asks politely and
checks its health: first alone, then beside all others. These are well-behaved clients that together
ask for less than it can do (clients.py), a greedy one that always asks for more, and hostile ones
(hostile.py), each with a loopback address of its own. Prints a line a minute, and in the end a
table. Fails if an answer was wrong, a health check or the polite client slow, a slot lost, any
status 5xx, or memory or descriptors grew. Linux only: it reads /proc.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable

import httpx2 as httpx
from absl import app, flags, logging
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.card.schemas import MODEL
from tools.soak.answers import COMPLETIONS, Known, WrongAnswerError, ask_all
from tools.soak.clients import Client, be_greedy, connect
from tools.soak.hostile import Hostile
from tools.soak.observer import observe
from tools.soak.report import Report
from tools.soak.server import END_S, SLOTS, Server, serving

CLIENTS, HOSTILE, HOSTILE_ADDRESSES = 6, 80, 4
PAUSE_S = 0.25
"""Between two requests of a well-behaved client, on average."""
IMPORT_S, WARM_S = 5, 300
"""For the observer's process to begin; when growth begins to count."""

_MINUTES = flags.DEFINE_float("minutes", 30, "How long the load lasts.", lower_bound=0.1)
_SEED = flags.DEFINE_integer("seed", 0, "Decides each client's requests; not how they interleave.")
_GROWTH = flags.DEFINE_float("max_growth_mib", 96, "How much more memory the server may hold.")


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
        known: requests whose answers are known, the polite client's first.
    """

    def __init__(self, server: Server, known: list[Known]):
        self._server, self._known = server, known
        minutes = _MINUTES.value
        self._alone_s = min(60, minutes * 15) + IMPORT_S
        self._began = time.monotonic() + self._alone_s
        """When the load begins."""
        self._end = self._began + minutes * 60
        self._counts: collections.Counter[str] = collections.Counter()
        self._warm: tuple[float, int] | None = None
        """Memory and open files when the server was warm."""
        self.report = Report(self._began)
        self.problems = self.report.problems

    async def run(self) -> None:
        """Observe it alone, drive it, then look at what is left."""
        context = multiprocessing.get_context("spawn")
        loop = asyncio.get_running_loop()
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            url, polite = self._server.url, self._known[0]
            seen = loop.run_in_executor(pool, observe, url, polite, self._end)
            await asyncio.sleep(self._alone_s)
            await self._drive()
            self.report.add_seen(await seen)
        if self._server.process.poll() is None:
            async with connect(self._server.url) as http:
                await self._check_end(http)
        print("done:", json.dumps(dict(sorted(self._counts.items()))))

    async def _drive(self) -> None:
        """Let all clients loose."""
        url, known, counts, seed = self._server.url, self._known, self._counts, _SEED.value
        before = self._server.cpu_s, _cpu_s()
        async with connect(url) as http, connect(url, "127.0.0.3") as greedy:
            greed = asyncio.create_task(be_greedy(greedy, counts))
            loads = []
            for i in range(CLIENTS):
                client = Client(
                    url, f"127.0.0.{20 + i}", known, random.Random(f"{seed} {i}"), counts
                )
                loads.append(self._repeat(client.acts.one, lambda: random.expovariate(1 / PAUSE_S)))
            for i in range(HOSTILE):
                address = f"127.0.0.{4 + i % HOSTILE_ADDRESSES}"
                hostile = Hostile(url, address, known, random.Random(f"{seed} -{i}"), counts)
                loads.append(self._repeat(hostile.acts.one, random.random))
            tasks = [asyncio.create_task(load) for load in loads]
            await self._watch(http)
            if greed.done():
                self.problems.append(f"the greedy client ended: {greed.exception()!r:.300}")
            for task in [greed, *tasks]:
                task.cancel()
            await asyncio.gather(greed, *tasks, return_exceptions=True)
        after = self._server.cpu_s, _cpu_s()
        self.report.cpu_s = after[0] - before[0], after[1] - before[1]

    async def _repeat(
        self, act: Callable[[], Awaitable[None]], pause_s: Callable[[], float]
    ) -> None:
        while self._server.process.poll() is None:
            try:
                await act()
            except WrongAnswerError as error:
                if str(error) not in self.problems:
                    print(error, file=sys.stderr, flush=True)
                self.problems.append(str(error))
            await asyncio.sleep(pause_s())

    async def _watch(self, http: httpx.AsyncClient) -> None:
        minute = 0
        while (now := time.monotonic()) < self._end:
            if self._server.process.poll() is not None:
                self.problems.append(f"the server ended with {self._server.process.returncode}")
                return
            if now - self._began >= minute * 60:
                await self._report(http, minute)
                minute += 1
            if self._warm is None and now - self._began >= WARM_S:
                self._warm = self._server.rss_mib, self._server.files
            self.report.files = max(self.report.files, self._server.files)
            asked = time.monotonic()
            await asyncio.sleep(0.5)
            self.report.late.append(time.monotonic() - asked - 0.5)

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
        got["5xx"] -= self._counts["503"]  # of bodies that did not fit
        for name in ("num_requests_running", "num_requests_waiting", "5xx"):
            if got[name]:
                self.problems.append(f"{name} is {got[name]:g} in the end")
        if (slots := await self._slots_at_once(http)) != SLOTS:
            self.problems.append(f"{slots} of {SLOTS} slots are left")
        if self._warm is None:
            return  # the run was too short to tell
        growth, files = self._server.rss_mib - self._warm[0], self._server.files - self._warm[1]
        print(f"growth since minute {WARM_S / 60:g}: {growth:.1f} MiB, {files} files")
        if growth > _GROWTH.value:
            self.problems.append(f"the server grew by {growth:.0f} MiB")
        if files > 0:  # there was traffic then, and now there is none
            self.problems.append(f"{files} more files are open than amid the traffic")

    async def _slots_at_once(self, http: httpx.AsyncClient) -> int:
        """Return how many requests run at once if more clients than slots have one each."""
        body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True}
        most = 0
        async with contextlib.AsyncExitStack() as stack:
            posts = []
            for i in range(SLOTS + 2):
                client = await stack.enter_async_context(connect(self._server.url, f"127.0.1.{i}"))
                post = client.post(COMPLETIONS, json=body | {"temperature": 5})
                posts.append(asyncio.create_task(post))
            while not all(post.done() for post in posts):
                most = max(most, int((await read_metrics(http))["num_requests_running"]))
                await asyncio.sleep(0.02)
            await asyncio.gather(*posts)
        return most


def _cpu_s() -> float:
    """Return the processor time that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(_: list[str]) -> None:
    """Soak, and fail if anything was wrong."""
    logging.set_verbosity(logging.WARNING)  # httpx logs every request
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving() as server:
        known = ask_all(server.url, step=1 if _MINUTES.value >= 1 else 16)
        soak = Soak(server, known)
        asyncio.run(soak.run())
        if server.process.poll() is None and (code := server.stop()) != 0:
            soak.problems.append(f"the exit status is {code}")
        log = server.log.read_text("utf-8", errors="replace")
        if "Traceback" in log:
            soak.problems.append("a traceback in the log: " + log[log.index("Traceback") :][:3000])
    soak.report.print()
    for problem, times in collections.Counter(soak.problems).most_common(20):
        print(f"{times} x {problem}", file=sys.stderr)
    if soak.problems:
        sys.exit(1)
    print("no problems")


if __name__ == "__main__":
    app.run(main)
