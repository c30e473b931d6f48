"""Load the engines, run the cases in turns, and make the figures of a record."""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO

import tqdm

from benchmarks import machine, worker
from benchmarks.cases import Case, Engine, contexts
from benchmarks.limits import Limits
from benchmarks.model_cost import total_params, weight_bytes
from benchmarks.worker import EngineError, Worker
from llama_jax.config import ModelConfig

Record = dict[str, Any]
Plan = dict[Engine, list[Case]]


def measure_limits() -> Limits:
    """Measure the device in a process of its own: `python -m benchmarks.limits`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.limits"],
        cwd=worker.ROOT,
        env=os.environ | worker.jax_settings(),
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        raise EngineError(f"measuring the limits ended with status {done.returncode}")
    return Limits(**json.loads(done.stdout))


@dataclasses.dataclass
class Run:
    """One measurement: what its steps share, and every figure as it was measured."""

    plan: Plan
    config: ModelConfig
    checkpoint: str | None
    """Folder of weights for ours; None: random ones. Peers' weights are always random."""
    rounds: int
    warm_start: bool
    """Load ours once more at the end, to compile from the cache of the first time."""
    on_gpu: bool
    log: pathlib.Path
    """File for what the engines print."""
    seconds: dict[tuple[Case, Engine], list[float]] = dataclasses.field(default_factory=dict)
    """Of a case, one per round."""
    engines: dict[Engine, Record] = dataclasses.field(default_factory=dict)
    """What an engine reported of itself: load_s, version, memory ..."""
    streaming: dict[Engine, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    """Seconds of a request streamed and whole, one dict per round."""
    failures: list[str] = dataclasses.field(default_factory=list)

    def measure(self) -> None:
        """Load all engines; then they take turns at each case."""
        ours = [engine for engine in self.plan if engine.kind == "ours"]
        cases = dict.fromkeys(case for own in self.plan.values() for case in own)
        total = self.rounds * (sum(map(len, self.plan.values())) + len(ours))
        with (
            tempfile.TemporaryDirectory(prefix="benchmarks_cache_") as cache,
            self.log.open("wb") as log,
            tqdm.tqdm(total=total, unit="run", file=sys.stderr, dynamic_ncols=True) as bar,
        ):
            with contextlib.ExitStack() as stack:
                workers = {}
                for engine in self.plan:
                    bar.set_description(f"{engine} load")
                    process = stack.enter_context(contextlib.closing(_start(engine, log, cache)))
                    if self._try(engine, self._load, process):
                        workers[engine] = process
                for case in cases:
                    able = [own for engine, own in workers.items() if case in self.plan[engine]]
                    self._in_turns(able, bar, self._time, case)
                able = [own for engine, own in workers.items() if engine.kind == "ours"]
                self._in_turns(able, bar, self._stream)
                for engine, process in workers.items():
                    self._try(engine, self._finish, process)
            for engine in ours if self.warm_start else []:
                bar.set_description(f"{engine} warm start")
                with contextlib.closing(_start(engine, log, cache)) as process:
                    self._try(engine, self._load, process, "compile_warm_s")

    def _try(self, engine: Engine, step: Callable[..., None], *arguments: Any) -> bool:
        """Take a step; note a failure, which must not end the others' measurement."""
        try:
            step(*arguments)
        except EngineError as error:
            self.failures.append(f"{engine}: {error}")
            return False
        return True

    def _in_turns(
        self, workers: list[Worker], bar: tqdm.tqdm, step: Callable[..., None], *arguments: Any
    ) -> None:
        """Take a step in every engine, round by round; the order is reversed every round."""
        able = list(workers)
        for turn in range(self.rounds):
            for process in workers if turn % 2 == 0 else workers[::-1]:
                bar.set_description(" ".join(map(str, (process.engine, *arguments))))
                if process in able and not self._try(process.engine, step, process, *arguments):
                    able.remove(process)
                bar.update()

    def _load(self, process: Worker, compiling: str = "compile_cold_s") -> None:
        engine = process.engine
        about = process.call(
            "load",
            config=engine.config(self.config).to_dict(),
            dtype=engine.dtype,
            contexts=contexts(self.plan[engine]),
            threads=machine.cores(),
            on_gpu=self.on_gpu,
            compiled=engine.kind == "hf-compile",
            checkpoint=self.checkpoint if engine.weights == "full" else None,
        )
        about = self.engines.setdefault(engine, about)
        if engine.kind == "ours":  # what stands for a user's first request
            least = {
                c.op: c for c in sorted(self.plan[engine], key=lambda c: -c.counted * c.tokens)
            }
            requests = [case.request() for case in least.values()]
            about[compiling] = process.call("start", requests=requests)

    def _time(self, process: Worker, case: Case) -> None:
        seconds = process.call(case.op, **case.request())
        self.seconds.setdefault((case, process.engine), []).append(seconds)

    def _stream(self, process: Worker) -> None:
        new_tokens = max(case.new_tokens for case in self.plan[process.engine])
        tokens = min(128, self.config.max_seq_len - new_tokens)
        seconds = process.call("streaming", tokens=tokens, new_tokens=new_tokens)
        self.streaming.setdefault(process.engine, []).append(seconds)

    def _finish(self, process: Worker) -> None:
        engine = process.engine
        config = engine.config(self.config)
        sizes = {
            "weights_bytes": weight_bytes(config, engine.dtype),
            "cache_bytes": max(engine.cache_bytes(config, case) for case in self.plan[engine]),
        }
        self.engines[engine] |= process.call("memory") | sizes

    def record(self, limits: Limits) -> Record:
        """Return the figures of a record, all made of the medians of the rounds."""
        config = self.config
        streaming = {}
        for engine, rounds in self.streaming.items():
            ratio = statistics.median(s["generate"] / s["stream"] for s in rounds)
            streaming[str(engine)] = {"rounds_s": rounds, "stream_over_whole": ratio}
        return {
            "limits": dataclasses.asdict(limits),
            "shape": {"parameters": total_params(config)},
            "engines": {str(engine): about for engine, about in self.engines.items()},
            "cases": [self._row(case, engine, limits) for case, engine in self.seconds],
            "streaming": streaming,
            "failures": self.failures,
        }

    def _row(self, case: Case, engine: Engine, limits: Limits) -> Record:
        """Return one case in one engine."""
        rounds = self.seconds[case, engine]
        ratios = {
            str(other): statistics.median(b / a for a, b in zip(times, rounds, strict=False))
            for (at, other), times in self.seconds.items()
            if at == case and _is_compared(other, engine)
        }
        figures = case.figures(
            engine.config(self.config), engine.dtype, statistics.median(rounds), limits
        )
        about = {"engine": str(engine), "dtype": engine.dtype, "rounds_s": rounds}
        return dataclasses.asdict(case) | about | figures | {"ours_over_this": ratios}


def _is_compared(ours: Engine, other: Engine) -> bool:
    """Return whether a report says how many times as fast ours is: as a peer, or quantized."""
    if other.kind != "ours":
        return ours.kind == "ours"
    quantized = dataclasses.replace(other, weights=ours.weights)
    return ours != other and ours == quantized and other.weights == "full"


def _start(engine: Engine, log: BinaryIO, cache: str) -> Worker:
    """Start an engine; ours keeps what it compiles for its warm start."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, str(engine).replace(":", "_")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return Worker(engine, log, environment)
