# pyright: reportMissingModuleSource=false
# (psutil comes with the bench extra, which type checks do not need)
"""Measure Ray's workers: the tokens/s of a batch on Ray beside those of local processes.

  python -m benchmarks.ray_workers --shape=300m

A worker for each core answers one file on Ray, and a process for each core its share of the same
file. Both sides are at work at once, and one is stopped (SIGSTOP) while the other has its turn, so
that both see the same minutes of the machine. See benchmarks/README.md.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from benchmarks import command, machine
from benchmarks.report import number
from benchmarks.servers import CLOSE_S, READY_S, Launch
from benchmarks.worker import ROOT, EngineError

FLAGS = command.make_flags(
    "300m",
    **command.SERVED,
    slots=(8, "Of each process."),
    rows_per_call=(8, "Of run.py batch: rows that a worker gets at once."),
    prompt_len=(32, "Tokens of a prompt."),
    new_tokens=(32, "Tokens of an answer, on average: from half as many to half as many again."),
    rows=(2000, "Of the file; what is not answered in time is left."),
    rounds=(24, "Turns of each side."),
    seconds=(10, "Of a turn."),
)


@dataclasses.dataclass
class Side:
    """Processes, and the files of the rows that they answer."""

    name: str
    processes: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)
    outputs: list[pathlib.Path] = dataclasses.field(default_factory=list)
    turns: list[float] = dataclasses.field(default_factory=list)
    """Tokens a second of each."""
    _family: dict[int, Any] = dataclasses.field(default_factory=dict)
    """psutil's processes by number: its own, and all that they were seen to start."""

    def answers(self) -> list[dict[str, Any]]:
        """Return the rows that are written."""
        texts = (path.read_text("utf-8") for path in self.outputs if path.exists())
        return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]

    def tokens(self) -> int:
        """Return how many tokens they have.

        Raises:
            EngineError: a row has an error.
        """
        rows = self.answers()
        for row in rows:
            if "error" in row:
                raise EngineError(f"{self.name}: a row failed: {row['error']}")
        return sum(row["result"]["usage"]["completion_tokens"] for row in rows)

    def send(self, kind: signal.Signals) -> None:
        """Send a signal to its processes and all that they started, until there are no others."""
        import psutil

        sent: set[int] = set()
        while new := self._find() - sent:
            for pid in new:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._family[pid].send_signal(kind)
            sent |= new

    def _find(self) -> set[int]:
        """Return the numbers of all that live."""
        import psutil

        for process in self.processes:
            if process.poll() is None:
                self._family.setdefault(process.pid, psutil.Process(process.pid))
        for one in psutil.process_iter():  # parents before their children, mostly: `send` repeats
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.ppid() in self._family:
                    self._family.setdefault(one.pid, one)
        self._family = {pid: one for pid, one in self._family.items() if one.is_running()}
        return set(self._family)

    def check(self) -> None:
        """Raise EngineError if a process has ended."""
        if any(process.poll() is not None for process in self.processes):
            raise EngineError(f"{self.name}: a process ended early")

    def wait_for(self, rows: int) -> None:
        """Wait until so many rows are answered.

        Raises:
            EngineError: a process ended, or it takes too long.
        """
        until = time.monotonic() + READY_S
        while len(self.answers()) < rows:
            self.check()
            if time.monotonic() > until:
                raise EngineError(f"{self.name}: not at work after {READY_S} s")
            time.sleep(0.2)

    def take_turn(self, seconds: float) -> None:
        """Compute for so long, and note how fast.

        Raises:
            EngineError: a process ended, or a row failed.
        """
        before = self.tokens()
        self.send(signal.SIGCONT)
        began = time.monotonic()
        time.sleep(seconds)
        self.send(signal.SIGSTOP)
        took = time.monotonic() - began
        self.check()
        self.turns.append((self.tokens() - before) / took)

    def end(self) -> None:
        """End all of it: first as `run.py batch` ends, then what is left."""
        self.send(signal.SIGCONT)
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE_S)
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()


@contextlib.contextmanager
def both(launch: Launch, folder: pathlib.Path, log: BinaryIO) -> Iterator[list[Side]]:
    """Start both sides, and end them."""
    from llama_jax.ray.cores import environment

    workers, lines = machine.cores(), [json.dumps(_row(i)) for i in range(FLAGS.rows)]
    base = [sys.executable, "run.py", "batch", f"--checkpoint={launch.weights}"]
    base += [f"--dtype={launch.dtype}", f"--slots={launch.slots}", f"--context={launch.context}"]
    own_cluster = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def start(side: Side, name: str, own: Sequence[str], *more: str, **variables: str) -> None:
        source, output = folder / f"{name}.jsonl", folder / f"{name}.out"
        source.write_text("\n".join(own) + "\n", "utf-8")
        line = [*base, f"--input={source}", f"--output={output}", *more]
        env = own_cluster | variables
        side.processes.append(subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=log))
        side.outputs.append(output)

    local, on_ray = Side("local"), Side("ray")
    with contextlib.ExitStack() as stack:
        for side in (local, on_ray):
            stack.callback(side.end)
        for k in range(workers):
            start(local, f"local{k}", lines[k::workers], **environment(1))
        rows_per_call = f"--rows_per_call={FLAGS.rows_per_call}"
        start(on_ray, "ray", lines, "--engine=ray", f"--workers={workers}", rows_per_call)
        yield [local, on_ray]


def _row(i: int) -> dict[str, Any]:
    """Return a request; lengths differ, so that answers do not end together.

    A token of the made-up vocabulary is a character.
    """
    prompt = f"{i} ".ljust(FLAGS.prompt_len, "a")
    tokens = FLAGS.new_tokens // 2 + i * 7919 % (FLAGS.new_tokens + 1)
    fixed = {"raw": True, "ignore_eos": True, "temperature": 0.8}
    return {"prompt": prompt, "seed": i + 1, "max_tokens": tokens} | fixed


def measure(sides: Sequence[Side]) -> dict[str, Any]:
    """Let the sides take turns; return their tokens/s and Ray's share of the local ones'."""
    for side in sides:  # the first waits, stopped, for the other
        side.wait_for(2 * FLAGS.slots * machine.cores())
        side.send(signal.SIGSTOP)
    for turn in range(FLAGS.rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            side.take_turn(FLAGS.seconds)
            if len(side.answers()) > FLAGS.rows - 4 * FLAGS.slots * machine.cores():
                raise EngineError(f"{side.name}: too few rows; more --rows, or fewer --rounds")
        command.note(f"round {turn + 1} of {FLAGS.rounds}: {make_report(summarise(sides))}")
    return summarise(sides)


def summarise(sides: Sequence[Side]) -> dict[str, Any]:
    """Return the tokens/s of both, Ray's share of the local ones', and that share's error.

    The standard error counts the turns as independent. They are not: what a turn computes and does
    not write counts in the next. So it is too large, if anything.
    """
    rates = {side.name: statistics.mean(side.turns) for side in sides}
    share = rates["ray"] / rates["local"]
    parts = [_variance(side.turns) / rates[side.name] ** 2 for side in sides]
    return {"tokens_per_s": rates, "share": share, "error": share * math.sqrt(sum(parts))}


def _variance(turns: Sequence[float]) -> float:
    """Return that of the mean."""
    return statistics.variance(turns) / len(turns) if len(turns) > 1 else 0.0


def make_report(found: dict[str, Any]) -> str:
    """Return the figures as a line."""
    rates = found["tokens_per_s"]
    return (
        f"{number(rates['ray'])} tokens/s on Ray, {number(rates['local'])} of local processes: "
        f"{found['share']:.2f} times (standard error {found['error']:.2f})"
    )


def run() -> int:
    """Measure what the flags say; return the exit status."""
    command.check_modules("benchmarks.ray_workers", ("ray", "psutil"))
    model, config, checkpoint = command.read_model(FLAGS)
    command.check_dtypes([FLAGS.dtype])
    context = FLAGS.prompt_len + FLAGS.new_tokens * 3 // 2 + 2  # with BOS
    command.check_room(config, context)
    path = command.output_path(FLAGS, "ray-workers", model)
    record = command.start_record("benchmarks.ray_workers", model, checkpoint)
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks_") as name,
        pathlib.Path(f"{path}.log").open("wb") as log,
    ):
        folder = pathlib.Path(name)
        launch = Launch("ours", FLAGS.dtype, config, checkpoint, folder, FLAGS.slots, context)
        launch.write()
        with both(launch, folder, log) as sides:
            found = measure(sides)
    print(make_report(found))
    row = {"engine": str(launch), "workers": machine.cores(), **found}
    row["turns"] = {side.name: side.turns for side in sides}
    command.write_record(record | {"ray_workers": [row]}, path, plot=False)
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
