"""Compare the requests a second that `benchmarks.capacity` predicts with the engine's.

  python -m benchmarks.capacity_check --shape=300m --mix=64:64:2,300:32:1,20:120:1

Each round answers requests of the mix through `Llama.generate_all`, all of which wait from the
beginning, and measures the rates of chunks and decode steps before and after: their means count, so
that a drift of the machine cancels. The prediction is of the same requests. Nothing is fitted.
"""

import dataclasses
import random
import statistics
import sys
import time
from typing import Any

from benchmarks import command, programs
from benchmarks.capacity import read_mix
from benchmarks.machine import cores, cpu_name
from benchmarks.report import table
from benchmarks.turns import Costs, Job, Kind, Turns, draw, formula
from benchmarks.weights import make_weights
from llama_jax.decode.state import DecodeState
from llama_jax.llama import Llama

FLAGS = command.make_flags(
    "300m",
    **command.SERVED,
    mix=(["64:64:2", "300:32:1", "20:120:1"], "Requests by PROMPT:OUTPUT:SHARE."),
    slots=(8, "Of the engine."),
    requests=(32, "Answered in each round, about."),
    rounds=(5, "Times that everything is measured."),
)
_RATIO = "predicted/measured"
REPEATS = 5
"""Times that each chunk and turn of steps is measured; their mean counts: a run has their sum."""


def measure(llama: Llama, context: int) -> Costs:
    """Return what the parts of a turn take, with so many tokens in each slot."""
    run = llama.executor
    state: DecodeState | None = None
    chunk_s, step_s, whole = {}, {}, []
    for size in run.plan.prefill_sizes:
        samples = []
        for _ in range(REPEATS):
            state, seconds = programs.time_chunk(run, state, size)
            samples.append(seconds)
        chunk_s[size] = statistics.fmean(samples)
    smallest = run.plan.prefill_sizes[0]
    for _ in range(REPEATS):
        state, seconds = programs.time_prefill(run, state, [3 + i for i in range(smallest)])
        whole.append(seconds)
    steps = run.plan.decode_steps * REPEATS
    for slots in run.sizes.decode_counts:
        state, seconds = programs.time_decode(run, state, context, steps, slots)
        step_s[slots] = seconds / steps
    besides = max(0.0, statistics.fmean(whole) - chunk_s[smallest])
    return Costs(chunk_s, step_s, besides, run.plan.decode_steps, run.plan.max_in_flight)


def mean(one: Costs, other: Costs) -> Costs:
    """Return the mean of two measurements."""
    return dataclasses.replace(
        one,
        chunk_s={size: (one.chunk_s[size] + other.chunk_s[size]) / 2 for size in one.chunk_s},
        step_s={slots: (one.step_s[slots] + other.step_s[slots]) / 2 for slots in one.step_s},
        request_s=(one.request_s + other.request_s) / 2,
    )


def answer(llama: Llama, jobs: list[Job], seed: int) -> float:
    """Answer requests of these lengths, no two of which begin alike; return the seconds."""
    source = random.Random(seed)
    ids = range(3, llama.executor.config.vocab_size)
    requests = [(source.choices(ids, k=len(job.prefix)), job.output) for job in jobs]
    began = time.perf_counter()
    tokens = programs.answer_all(llama, requests)
    seconds = time.perf_counter() - began
    assert tokens == sum(job.output for job in jobs)
    return seconds


def mean_context(mix: list[Kind]) -> int:
    """Return the tokens that a decoding slot holds on average."""
    weights = [kind.share * kind.output for kind in mix]
    return round(statistics.fmean([k.prompt + k.output / 2 for k in mix], weights))


def compare(costs: Costs, mix: list[Kind], jobs: list[Job], measured: float) -> dict[str, Any]:
    """Return the figures of a round; `measured`: the requests a second of these jobs."""
    predicted = len(jobs) / Turns(costs, FLAGS.slots, jobs).now
    bound = formula(costs, FLAGS.slots, mix)
    largest, most = max(costs.chunk_s), max(costs.step_s)
    return {
        "prefill tok/s": largest / costs.chunk_s[largest],
        f"decode tok/s of {most}": most / costs.step_s[most],
        "formula req/s": bound.requests_per_s,
        "predicted req/s": predicted,
        "measured req/s": measured,
        _RATIO: predicted / measured,
        "bound by": bound.by,
    }


def run() -> int:
    """Measure what the flags say; return the exit status."""
    command.check_dtypes([FLAGS.dtype])
    model, config, checkpoint = command.read_model(FLAGS)
    mix = [dataclasses.replace(kind, prompt=max(1, kind.prompt)) for kind in read_mix(FLAGS.mix)]
    context = max(kind.prompt + kind.output for kind in mix)
    command.check_room(config, context)
    command.note(f"{model}, {FLAGS.dtype}: weights and programs")
    weights = make_weights(config, FLAGS.dtype, checkpoint)
    room = min(config.max_seq_len, max(context, mean_context(mix) + 100))
    llama = Llama(weights, slots=FLAGS.slots, context=room)
    for _ in llama.engine.warm_up():
        pass
    measure(llama, mean_context(mix))  # untimed: to compile, and to touch all memory
    answer(llama, draw(mix, FLAGS.slots), seed=-1)
    llama.executor.compile_wanted()
    rows = []
    before = measure(llama, mean_context(mix))
    for turn in range(FLAGS.rounds):
        jobs = draw(mix, FLAGS.requests, seed=turn)
        measured = len(jobs) / answer(llama, jobs, turn)
        after = measure(llama, mean_context(mix))
        rows.append(compare(mean(before, after), mix, jobs, measured))
        before = after
        command.note(f"round {turn + 1} of {FLAGS.rounds}: {rows[-1][_RATIO]:.3f}")
    print(f"{model}, {FLAGS.dtype}, {FLAGS.slots} slots; {cpu_name()}, {cores()} cores")
    print(table(rows))
    print(f"{_RATIO}, median: {statistics.median(row[_RATIO] for row in rows):.3f}")
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
