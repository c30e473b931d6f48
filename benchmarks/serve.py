"""Measure the server: what clients see under load, against the engine alone and other servers.

  python -m benchmarks.serve --shape=300m
  python -m benchmarks.serve --shape=1b --rate=0.5,1 --against=llamacpp,hf

See benchmarks/README.md.
"""

import collections
import contextlib
import dataclasses
import pathlib
import re
import shutil
import statistics
import sys
import tempfile
from typing import Any, BinaryIO

from tqdm import tqdm

from benchmarks import command
from benchmarks.cases import Engine
from benchmarks.load import (
    Point,
    Prompts,
    Rounds,
    drive,
    make_points,
    make_prompts,
    median,
    prompts_of,
)
from benchmarks.model_cost import total_params
from benchmarks.report import make_serving_report
from benchmarks.servers import PEERS, Launch, running
from benchmarks.worker import EngineError, Worker
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError

FLAGS = command.make_flags(
    "300m",
    **command.SERVED,
    slots=(8, "Of each server: answers decoded at once."),
    prompt_len=(64, "Tokens of a prompt."),
    new_tokens=(64, "Tokens to draw for each."),
    requests=(128, "Of each load, at most; 16 for each client."),
    rounds=(3, "Times that everything is measured."),
    clients=(["1", "4", "16", "64"], "Closed loops: each client waits for its answer."),
    rate=([], "Open loops: requests a second, at random times."),
    against=([], f"Peers to measure in turns with it: {', '.join(PEERS)}."),
    llama_server=("llama-server", "llama.cpp's program."),
    shared=(True, "Also: prompts with a shared prefix."),
    batch=(True, "Also: the requests without a server."),
)

Record = dict[str, Any]


def make_launches(config: ModelConfig, checkpoint: str | None, folder: str) -> list[Launch]:
    """Return the servers to start, ours first; their files are made up in `folder`."""
    command.check_dtypes([FLAGS.dtype])
    command.check_choices("--against", FLAGS.against, PEERS)
    for name in FLAGS.against:
        command.check_modules(f"--against={name}", PEERS[name])
    if "llama-server" in FLAGS.against and shutil.which(FLAGS.llama_server) is None:
        raise InputError(f"--llama_server={FLAGS.llama_server} is no program; name llama.cpp's")
    context = FLAGS.prompt_len + FLAGS.new_tokens
    sizes = (pathlib.Path(folder), FLAGS.slots, context, FLAGS.llama_server)
    launches = [
        Launch(name, FLAGS.dtype, config, checkpoint, *sizes)
        for name in dict.fromkeys(["ours", *FLAGS.against])
    ]
    for launch in launches:
        command.note(f"writing weights for {launch}")
        launch.write()
    return launches


def serve_once(
    launch: Launch, prompts: Prompts, log: BinaryIO, bar: tqdm
) -> tuple[dict[Point, Record], list[str]]:
    """Start a server, put each load on it; return the figures, and the requests that failed."""
    figures, failures = {}, []
    with running(launch, log) as server:
        # Use every slot once, for prompts that are not asked again.
        warm_up = make_prompts(launch.config.vocab_size, launch.slots, FLAGS.prompt_len, seed=1)
        drive(server, Point("closed", launch.slots, launch.slots), warm_up, 2)
        for point, own in prompts.items():
            bar.set_description(f"{launch}, {point}")
            answers, figures[point] = drive(server, point, own, FLAGS.new_tokens, bar.update)
            errors = collections.Counter(a.error for a in answers if a.error is not None)
            failures += [f"{launch}, {point}: {n} requests: {error}" for error, n in errors.items()]
    return figures, failures


def run_batch(launch: Launch, prompts: list[list[int]], log: BinaryIO) -> Record:
    """Answer the requests in a process without a server, as many at once as there are slots."""
    with contextlib.closing(Worker(Engine("ours", launch.dtype), log)) as process:
        config = dataclasses.asdict(launch.config)
        about = {"dtype": launch.dtype, "checkpoint": launch.checkpoint}
        process.call("load", config=config, contexts={1: launch.context}, **about)
        sizes = {"new_tokens": FLAGS.new_tokens, "slots": launch.slots}
        return {"requests": len(prompts), **process.call("batch_of", prompts=prompts, **sizes)}


def ratio(one: Rounds, other: Rounds) -> float | None:
    """Return the median of the rounds' ratios of tokens a second, over rounds that both have."""
    pairs = [
        (a["tokens_per_s"], b["tokens_per_s"]) for a, b in zip(one, other, strict=True) if a and b
    ]
    ratios = [a / b for a, b in pairs if b]
    return statistics.median(ratios) if ratios else None


def row(launch: Launch, point: Point, rounds: Rounds, ours: Rounds) -> Record:
    """Return what a record holds of one server under one load; `ours`: our server's rounds."""
    return {
        "engine": str(launch),
        "slots": 1 if launch.program == "llamacpp" else launch.slots,
        "load": str(point),
        "kind": point.kind,
        "amount": point.amount,
        "median": median(rounds),
        "rounds": [figures for figures in rounds if figures],
        "ours_over_this": ratio(ours, rounds),
    }


def measure(launches: list[Launch], points: list[Point], log: pathlib.Path) -> Record:
    """Measure every server in each round, started anew; the order is reversed every round.

    Returns:
        What a record holds of it: medians, every round, ratios and failures.
    """
    ours, failures = launches[0], []
    prompts = prompts_of(points, ours.config.vocab_size, FLAGS.prompt_len)
    saturated = [point for point in points if point.kind == "closed"][-1]
    batch = dataclasses.replace(saturated, kind="batch")
    served: dict[tuple[Launch, Point], Rounds] = collections.defaultdict(list)
    with log.open("wb") as file, tqdm(unit="request", file=sys.stderr) as bar:
        for turn in range(FLAGS.rounds):
            for launch in launches if turn % 2 == 0 else launches[::-1]:
                figures: dict[Point, Record] = {}
                try:
                    figures, failed = serve_once(launch, prompts, file, bar)
                    failures += failed
                    if launch == ours and FLAGS.batch:
                        figures[batch] = run_batch(launch, prompts[saturated], file)
                except (EngineError, OSError) as error:  # must not end the others' measurement
                    failures.append(f"{launch}: {error}")
                for point in (*points, batch):
                    served[launch, point].append(figures.get(point))
    rows = [
        row(launch, point, rounds, served[ours, saturated if point == batch else point])
        for (launch, point), rounds in served.items()
        if any(rounds)
    ]
    return {
        "points": [row for row in rows if row["kind"] != "batch"],
        "batches": [row for row in rows if row["kind"] == "batch"],
        # Paths are of this machine alone.
        "failures": [re.sub(r"(?<!\w)/[\w./-]+", "...", text) for text in failures],
    }


def run() -> int:
    """Measure what the flags say; return the exit status."""
    command.check_modules("benchmarks.serve", ("httpx", "httpx_sse"))
    model, config, checkpoint = command.read_model(FLAGS)
    command.check_room(config, FLAGS.prompt_len + FLAGS.new_tokens)
    clients = command.read_numbers(FLAGS, "clients")
    points = make_points(clients, FLAGS.rate, FLAGS.requests, shared=FLAGS.shared)
    path = command.output_path(FLAGS, "serve", model)
    log = pathlib.Path(f"{path}.log")
    record = command.start_record("benchmarks.serve", model, checkpoint)
    names = ("prompt_len", "new_tokens", "rounds")
    record["settings"] = {name: FLAGS[name].value for name in names}
    record["shape"] = {"parameters": total_params(config)}
    with tempfile.TemporaryDirectory(prefix="benchmarks_") as folder:
        record |= measure(make_launches(config, checkpoint, folder), points, log)
    print(make_serving_report(record))
    command.write_record(record, path, plot=bool(record["points"]))
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
