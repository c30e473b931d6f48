"""Start the servers in turns, put load on them, and keep every figure."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import tqdm

from benchmarks.load.drive import drive
from benchmarks.load.gap import context_needed, measure_gap
from benchmarks.load.points import Point
from benchmarks.load.programs import Launch
from benchmarks.load.prompts import Prompt, Prompts
from benchmarks.load.server import Server, running
from benchmarks.worker import ROOT, EngineError, jax_settings

SHARED = 0.75
"""Of a prompt, what is the same in all prompts of a point with a shared prefix."""
GAP_S = 600
"""Seconds that letting long prompts in may take."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What every server is to do."""

    points: tuple[Point, ...]
    prompt_len: int
    new_tokens: int
    rounds: int
    timeout_s: float
    """Of one request."""
    seed: int
    batch: bool
    """Whether the same requests go through our engine without a server, too."""
    gap: int | None
    """Tokens of a long prompt; None: not measured."""

    @property
    def saturated(self) -> Point:
        """The closed loop of the most clients."""
        return max((p for p in self.points if p.kind == "closed"), key=lambda p: p.amount)

    def points_of(self, launch: Launch, most_slots: int) -> tuple[Point, ...]:
        """Return a server's points: all at the most slots, else the saturated one."""
        return self.points if launch.slots == most_slots else (self.saturated,)

    def prompts(self, vocab_size: int) -> dict[Point, list[Prompt]]:
        """Return what every server is asked, by point."""
        prompts = Prompts(vocab_size, self.seed)
        return {
            point: prompts.make(
                point.requests,
                self.prompt_len,
                self.new_tokens,
                shared=round(SHARED * self.prompt_len) if point.kind == "shared" else 0,
            )
            for point in self.points
        }


Rounds = dict[int, dict[str, Any]]
"""Figures by round; one in which something failed is not there."""


@dataclasses.dataclass
class Measured:
    """Every figure, as it was measured."""

    points: dict[tuple[Launch, Point], Rounds] = dataclasses.field(default_factory=dict)
    batches: dict[Launch, Rounds] = dataclasses.field(default_factory=dict)
    gaps: dict[Launch, Rounds] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)


def measure(launches: list[Launch], load: Load, log: pathlib.Path) -> Measured:
    """Run all points on all servers, round by round.

    Every server is started anew in each round: nothing of another's is in memory beside it, and
    its cache is empty. The order is turned around from round to round.

    Args:
        launches: the servers.
        load: what they are to do.
        log: file for what they print.
    """
    measured = Measured()
    most = max(launch.slots for launch in launches)
    total = sum(p.requests for one in launches for p in load.points_of(one, most))
    with (
        log.open("wb") as file,
        tqdm.tqdm(
            total=load.rounds * total, unit="request", file=sys.stderr, dynamic_ncols=True
        ) as bar,
    ):
        run = _Run(load, load.prompts(launches[0].config.vocab_size), measured, bar, file, most)
        try:
            for turn in range(load.rounds):
                for launch in launches if turn % 2 == 0 else launches[::-1]:
                    run.turn(launch, turn)
        except KeyboardInterrupt:
            if not measured.points:
                raise
            measured.failures.append("stopped before the end: the rest was not measured")
    return measured


@dataclasses.dataclass
class _Run:
    """What the steps of one measurement share."""

    load: Load
    prompts: dict[Point, list[Prompt]]
    measured: Measured
    bar: tqdm.tqdm
    log: BinaryIO
    most_slots: int

    def turn(self, launch: Launch, turn: int) -> None:
        """Measure one server once."""
        measured = self.measured
        with self._noting(launch), running(launch, self.log) as server:
            self._warm_up(server)
            capacity = None
            for point in self.load.points_of(launch, self.most_slots):
                figures = self._point(server, point, capacity)
                measured.points.setdefault((launch, point), {})[turn] = figures
                if point == self.load.saturated:
                    capacity = figures["requests_per_s"]
                server.check()
        with self._noting(launch):
            if launch.program == "ours" and self.load.batch:
                self._show(launch, "batch")
                figures = run_batch(launch, self.prompts[self.load.saturated], self.log)
                measured.batches.setdefault(launch, {})[turn] = figures
        with self._noting(launch):
            if launch.batches and launch.slots == self.most_slots > 1 and self.load.gap:
                self._show(launch, f"a prompt of {self.load.gap} beside streams")
                measured.gaps.setdefault(launch, {})[turn] = self._gap(launch, self.load.gap)

    def _warm_up(self, server: Server) -> None:
        """Use every slot once, for prompts that are asked for no more."""
        self._show(server.launch, "warm-up")
        slots, load = server.launch.slots, self.load
        prompts = Prompts(server.launch.config.vocab_size, load.seed + 1)
        made = prompts.make(slots, load.prompt_len, 2)
        point = Point("closed", slots, slots)
        drive(server, point, made, rate=None, timeout_s=load.timeout_s, seed=0)

    def _point(self, server: Server, point: Point, capacity: float | None) -> dict[str, Any]:
        """Put the load of a point on a server; return its figures."""
        self._show(server.launch, str(point))
        answers, figures = drive(
            server,
            point,
            self.prompts[point],
            rate=point.rate(capacity),
            timeout_s=self.load.timeout_s,
            seed=self.load.seed,
            on_answer=self.bar.update,
        )
        told = collections.Counter(without_paths(a.error) for a in answers if a.error is not None)
        for error, count in told.items():
            self.measured.failures.append(f"{server.launch}, {point}: {count} requests: {error}")
        return figures

    def _gap(self, launch: Launch, long_prompt: int) -> dict[str, Any]:
        """Let long prompts in beside running streams."""
        context = context_needed(long_prompt, launch.config.max_seq_len)
        launch = dataclasses.replace(launch, context=context)
        with running(launch, self.log) as server:
            return measure_gap(server, long_prompt, GAP_S)

    @contextlib.contextmanager
    def _noting(self, launch: Launch) -> Iterator[None]:
        """Note a server's failure, and go on: it must not end the others' measurement."""
        try:
            yield
        except (EngineError, TimeoutError, OSError) as error:
            text = str(error) or type(error).__name__
            self.measured.failures.append(f"{launch}, {launch.slots} slots: {without_paths(text)}")

    def _show(self, launch: Launch, what: str) -> None:
        self.bar.set_description(f"{launch}, {launch.slots} slots, {what}")


def without_paths(text: str) -> str:
    """Return an error's text without paths, which are nobody else's."""
    return re.sub(r"(?<!\w)/[\w./-]+", "...", text)


def run_batch(launch: Launch, prompts: list[Prompt], log: BinaryIO) -> dict[str, float]:
    """Generate for prompts in a process of its own; return what `serve_ours.run_batch` does.

    Raises:
        EngineError: it failed.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.engines.serve_ours", "batch"),
            json.dumps(launch.settings()),
        ],
        cwd=ROOT,
        env=os.environ | jax_settings(),
        input=json.dumps(
            {"prompts": [p.tokens for p in prompts], "new_tokens": prompts[0].new_tokens}
        ),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    if done.returncode:
        raise EngineError(f"{launch}: the batch ended with status {done.returncode}; see the log")
    figures = json.loads(done.stdout.splitlines()[-1])
    rate = figures["tokens"] / figures["seconds"]
    return {"requests": len(prompts), **figures, "tokens_per_s": rate}
