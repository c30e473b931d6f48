"""Measure prefill interference: how long streams wait while a long prompt is prefilled beside them.

  python -m benchmarks.prefill_interference --shape=300m --prompt_len=2000

All slots but one draw long answers. Three long prompts come in, one after the other; each stream's
waits for its next burst of text are compared with the median of those when nothing is prefilled.
The table goes to stdout; figures and a plot go to files. Exit status: 0 done, 1 it failed while it
was measured, 2 a mistake in the input. See benchmarks/README.md.
"""

import asyncio
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import command, machine
from benchmarks.load import Answer, ask, connect, make_prompts, spread
from benchmarks.report import number, table
from benchmarks.serve import median
from benchmarks.servers import Launch, Server, running
from benchmarks.worker import EngineError
from llama_jax.errors import InputError

ADMISSIONS = 3
"""Long prompts, one after the other."""
IDLE_BURSTS = 8
"""Bursts of each stream before the first of them, and after each."""
STREAM_PROMPT = 16

FLAGS = command.make_flags("300m")
command.add_checkpoint_flag(FLAGS)
flags.DEFINE_string("dtype", "float16", "Of weights and cache.", flag_values=FLAGS)
flags.DEFINE_integer("slots", 8, "Of the server; all but one stream.", flag_values=FLAGS)
flags.DEFINE_integer("prompt_len", 2000, "Tokens of the long prompts.", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 3, "Times that it is measured.", flag_values=FLAGS)
flags.DEFINE_float("timeout_s", 600.0, "Seconds for one round.", flag_values=FLAGS)

Wait = tuple[float, float]
"""When it began and when it ended."""


async def measure(server: Server, prompt_len: int, timeout_s: float) -> dict[str, Any]:
    """Return how long streams wait for bursts, in seconds: otherwise, and beside a long prompt."""
    launch = server.launch
    vocab_size = launch.config.vocab_size
    new_tokens = launch.context - STREAM_PROMPT
    streams = [Answer(time.perf_counter()) for _ in range(launch.slots - 1)]
    admissions = []

    async def wait_for_bursts() -> None:
        targets = [len(stream.bursts()) + IDLE_BURSTS for stream in streams]
        while any(
            len(stream.bursts()) < target and not task.done()
            for stream, target, task in zip(streams, targets, tasks, strict=True)
        ):
            await asyncio.sleep(0.005)

    async with asyncio.timeout(timeout_s), connect(server) as client:
        starts = zip(streams, make_prompts(vocab_size, len(streams), STREAM_PROMPT), strict=True)
        tasks = [
            asyncio.create_task(ask(client, launch.body(prompt, new_tokens), timeout_s, stream))
            for stream, prompt in starts
        ]
        try:
            await wait_for_bursts()
            steady = time.perf_counter()
            await wait_for_bursts()
            for prompt in make_prompts(vocab_size, ADMISSIONS, prompt_len):
                admissions.append(await ask(client, launch.body(prompt, 1), timeout_s))
                await wait_for_bursts()
            ended = min((s.ended for s in streams if s.ended), default=time.perf_counter())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    failed = [answer.error for answer in [*admissions, *streams] if answer.error]
    bursts = [[moment for moment, _ in stream.bursts()] for stream in streams]
    waits = [wait for moments in bursts for wait in itertools.pairwise(moments)]
    figures = compare(waits, steady, ended, [(a.began, a.ended) for a in admissions])
    if failed or figures["max_ratio"] is None:
        reason = failed[0] if failed else "streams ended too soon, --prompt_len is too long"
        raise EngineError(f"{launch}: {reason}")
    return figures | {"streams": len(streams), "long_prompt": prompt_len}


def compare(
    waits: Sequence[Wait], steady: float, ended: float, admissions: Sequence[Wait]
) -> dict[str, Any]:
    """Return the figures of waits during admissions, and otherwise."""
    counted = [(b, e) for b, e in waits if b >= steady and e <= ended]
    during = {wait for wait in counted if any(wait[0] < e and wait[1] > b for b, e in admissions)}
    idle = spread(e - b for b, e in counted if (b, e) not in during)
    beside = spread(e - b for b, e in counted if (b, e) in during)
    base = idle["p50"]
    return {
        "idle_s": idle,
        "during_s": beside,
        "p99_ratio": beside["p99"] / base if base and beside["p99"] else None,
        "max_ratio": beside["max"] / base if base and beside["max"] else None,
        "first_token_s": spread(e - b for b, e in admissions)["p50"],
        "admissions": [[b - steady, e - steady] for b, e in admissions],
        "waits": sorted([b - steady, e - b] for b, e in counted),
    }


def make_report(median: dict[str, Any]) -> str:
    """Return the medians of the rounds as text."""
    columns = {
        "waits for a burst": lambda row: row[0],
        "p50 ms": lambda row: number(row[1]["p50"], 1e3),
        "p99 ms": lambda row: number(row[1]["p99"], 1e3),
        "max ms": lambda row: number(row[1]["max"], 1e3),
    }
    rows = [("otherwise", median["idle_s"]), ("beside a long prompt", median["during_s"])]
    return (
        f"{table(columns, rows)}\n{median['streams']:g} streams; a prompt of "
        f"{median['long_prompt']:,g} tokens is prefilled in {number(median['first_token_s'])} s; "
        f"the longest wait is {number(median['max_ratio'])} times the median otherwise"
    )


def run() -> int:
    """Measure what the flags say; return the exit status."""
    command.check_modules("benchmarks.prefill_interference", ("httpx", "httpx_sse"))
    model, config, checkpoint = command.read_model(FLAGS)
    command.check_positive(FLAGS, "prompt_len", "rounds", "timeout_s")
    command.check_room(config, FLAGS.prompt_len + 1)
    if FLAGS.slots < 2:
        raise InputError("--slots is below 2: one streams while another is prefilled")
    path = command.output_path(FLAGS, "prefill-interference", model, machine.cpu_name())
    record = command.start_record("benchmarks.prefill_interference", model, checkpoint)
    # Streams should outlast the long prompts.
    context = min(config.max_seq_len, max(2 * FLAGS.prompt_len, FLAGS.prompt_len + 1024))
    dtype, rounds = command.check_dtype(FLAGS.dtype), []
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks_") as name,
        path.with_name(f"{path.name}.log").open("wb") as log,
    ):
        folder = pathlib.Path(name)
        launch = Launch("ours", dtype, config, checkpoint, folder, FLAGS.slots, context)
        launch.write()
        for _ in range(FLAGS.rounds):
            with running(launch, log) as server:
                rounds.append(asyncio.run(measure(server, FLAGS.prompt_len, FLAGS.timeout_s)))
    row = {"engine": str(launch), "slots": FLAGS.slots, "median": median(rounds), "rounds": rounds}
    print(make_report(row["median"]))
    command.write_record(record | {"prefill_interference": [row]}, path)
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
