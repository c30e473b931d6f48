"""Load the engines, run the cases in turns, and keep every figure."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from benchmarks import machine, worker
from benchmarks.cases import Case, Engine, Plan, Skipped
from benchmarks.engines.protocol import UnsupportedError
from benchmarks.limits import Limits
from benchmarks.worker import EngineError, Worker
from llama_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure, besides what."""

    config: ModelConfig
    checkpoint: str | None
    """Folder of weights for ours; None: random ones. Peers' weights are always random."""
    rounds: int
    warm_start: bool
    """Load ours once more at the end, to compile from the cache of the first time."""
    flax_python: str | None
    on_gpu: bool
    log: pathlib.Path
    """File for what the engines print."""


@dataclasses.dataclass
class Measured:
    """Every figure, as it was measured; seconds and bytes."""

    rounds: dict[tuple[Case, Engine], list[float]] = dataclasses.field(default_factory=dict)
    """Seconds of a case, one per round."""
    engines: dict[Engine, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What an engine said of itself: load_s, version, memory ..."""
    streaming: dict[Engine, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    """Seconds of a request streamed, whole and bare, one dict per round."""
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)


def measure_limits() -> Limits:
    """Measure the device in a process of its own: `python -m benchmarks.limits`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.limits"],
        cwd=worker.ROOT,
        env=os.environ | worker.jax_settings(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise EngineError(f"measuring the limits failed: {lines[-1]}")
    return Limits(**json.loads(done.stdout.splitlines()[-1]))


def measure(plan: Plan, settings: Settings) -> Measured:
    """Run the plan: all engines in turns if they fit into memory together, else one by one."""
    measured = Measured(skipped=list(plan.skipped))
    groups = [list(plan.cases)] if plan.together else [[engine] for engine in plan.cases]
    ours = [engine for engine in plan.cases if engine.kind == "ours"]
    total = len(plan.cases) + (len(ours) if settings.warm_start else 0)
    total += settings.rounds * (sum(map(len, plan.cases.values())) + len(ours))
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks_cache_") as cache,
        settings.log.open("wb") as log,
        tqdm.tqdm(total=total, unit="run", file=sys.stderr, dynamic_ncols=True) as bar,
    ):
        run = _Run(plan, settings, measured, bar, log, pathlib.Path(cache))
        try:
            for group in groups:
                run.group(group)
            for engine in ours if settings.warm_start else []:
                run.warm_start(engine)
        except KeyboardInterrupt:
            if not measured.rounds:
                raise
            measured.failures.append("stopped before the end: the rest was not measured")
    return measured


@dataclasses.dataclass
class _Run:
    """One execution of a plan: what its steps share."""

    plan: Plan
    settings: Settings
    measured: Measured
    bar: tqdm.tqdm
    log: Any
    cache: pathlib.Path

    def group(self, engines: Sequence[Engine]) -> None:
        """Load some engines and run their cases, turn by turn."""
        with contextlib.ExitStack() as stack:
            workers = {}
            for engine in engines:
                loaded = stack.enter_context(self._loaded(engine))
                if loaded:
                    workers[engine] = loaded
                else:
                    reason = "did not load"
                    own = self.plan.cases[engine]
                    self.measured.skipped += [Skipped(engine, case, reason) for case in own]
            # In order of work, each case once, whichever engine runs it.
            cases = dict.fromkeys(case for engine in workers for case in self.plan.cases[engine])
            for case in cases:
                self._case(case, [e for e in workers if case in self.plan.cases[e]], workers)
            self._streaming([e for e in workers if e.kind == "ours"], workers)
            for engine, loaded in workers.items():
                about = self.measured.engines[engine]
                with self._noting(engine, "memory"):
                    about |= loaded.call("memory")
                    if engine.kind == "ours":
                        about["programs"] = loaded.call("programs")

    def warm_start(self, engine: Engine) -> None:
        """Time the compilation of a new process that finds the first one's in the cache."""
        with self._loaded(engine, "compile_warm_s"):
            pass

    @contextlib.contextmanager
    def _loaded(self, engine: Engine, compiling: str = "compile_cold_s") -> Iterator[Worker | None]:
        """Start an engine and load its model; None if it fails, which is then noted."""
        self._show(engine, "load")
        python = self.settings.flax_python if engine.kind == "flax" else None
        environment = {}
        if engine.kind == "ours":
            environment = {
                "JAX_COMPILATION_CACHE_DIR": str(self.cache / str(engine).replace(":", "_")),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        with contextlib.closing(
            Worker(engine, self.log, python=python, environment=environment)
        ) as loaded:
            done = False
            with self._noting(engine, "load"):
                about = loaded.call(
                    "load",
                    config=dataclasses.asdict(self.settings.config),
                    dtype=engine.dtype,
                    contexts=self.plan.contexts(engine),
                    threads=machine.cores(),
                    on_gpu=self.settings.on_gpu,
                    compiled=engine.kind == "hf-compile",
                    checkpoint=self.settings.checkpoint,
                )
                about = self.measured.engines.setdefault(engine, about)
                if engine.kind == "ours":
                    about[compiling] = loaded.call("start", **_first_request(self.plan, engine))
                done = True
            self.bar.update()
            yield loaded if done else None

    def _case(self, case: Case, engines: list[Engine], workers: dict[Engine, Worker]) -> None:
        """Time a case in every engine, round by round, there and back."""

        def once(engine: Engine) -> None:
            seconds = workers[engine].call(case.op, **case.request())
            self.measured.rounds.setdefault((case, engine), []).append(seconds)

        failed = self._rounds(engines, str(case), once)
        for engine, reason in failed.items():
            self.measured.rounds.pop((case, engine), None)
            self.measured.skipped.append(Skipped(engine, case, reason))

    def _streaming(self, engines: list[Engine], workers: dict[Engine, Worker]) -> None:
        """Time a request streamed and whole."""

        def once(engine: Engine) -> None:
            new_tokens = max(case.new_tokens for case in self.plan.cases[engine])
            room = self.settings.config.max_seq_len - new_tokens
            tokens = min(_first_request(self.plan, engine)["tokens"], room)
            seconds = workers[engine].call("streaming", tokens=tokens, new_tokens=new_tokens)
            self.measured.streaming.setdefault(engine, []).append(seconds)

        self._rounds(engines, "streaming", once)

    def _rounds(
        self, engines: list[Engine], what: str, once: Callable[[Engine], None]
    ) -> dict[Engine, str]:
        """Do something in every engine, in turns; return those that failed, and why."""
        failed: dict[Engine, str] = {}
        for turn in range(self.settings.rounds):
            for engine in engines if turn % 2 == 0 else engines[::-1]:
                self._show(engine, what)
                if engine not in failed:
                    with self._noting(engine, what) as problems:
                        once(engine)
                    failed |= dict.fromkeys([engine] if problems else [], "".join(problems))
                self.bar.update()
        return failed

    @contextlib.contextmanager
    def _noting(self, engine: Engine, what: str) -> Iterator[list[str]]:
        """Note an engine's failure, and go on: it must not end the others' measurement."""
        problems: list[str] = []
        try:
            yield problems
        except UnsupportedError as error:
            problems.append(str(error))
        except EngineError as error:
            problems.append(str(error))
            self.measured.failures.append(f"{engine}, {what}: {error}")

    def _show(self, engine: Engine, what: str) -> None:
        self.bar.set_description(f"{engine} {what}")


def _first_request(plan: Plan, engine: Engine) -> dict[str, int]:
    """Return the smallest work of the plan: what stands for a user's first request."""
    own = plan.cases[engine]
    decodes = [case for case in own if case.op == "decode"] or [Case("decode", 1)]
    prompts = [case.tokens for case in own if case.op == "prefill"]
    smallest = min(decodes, key=lambda case: (case.batch, case.tokens))
    room = plan.contexts(engine)[1] - 1
    return {
        "tokens": min([*prompts, max(1, min(room, smallest.tokens))]),
        "context": smallest.tokens,
        "batch": smallest.batch,
    }
