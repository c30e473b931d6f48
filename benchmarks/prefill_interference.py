"""Measure prefill interference: how long streams wait while a long prompt is prefilled beside them.

  python -m benchmarks.prefill_interference --shape=300m --prompt_len=2000

All slots but one draw long answers. Three long prompts come in, one after the other; each stream's
waits for its next burst of text are compared with the median of those when nothing is prefilled.
See benchmarks/README.md.
"""

import asyncio
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import command
from benchmarks.load import Answer, ask, connect, make_prompts, median, spread
from benchmarks.report import number, scaled, table
from benchmarks.servers import Launch, Server, running
from benchmarks.worker import EngineError
from llama_jax.errors import InputError

ADMISSIONS = 3
"""Long prompts, one after the other."""
IDLE_BURSTS = 8
"""Bursts of each stream before the first of them, and after each."""
STREAM_PROMPT = 16

FLAGS = command.make_flags(
    "300m",
    **command.SERVED,
    slots=(8, "Of the server; all but one stream."),
    prompt_len=(2000, "Tokens of the long prompts."),
    rounds=(3, "Times that it is measured."),
)

Wait = tuple[float, float]
"""When it began and when it ended."""


async def measure(server: Server, prompt_len: int) -> dict[str, Any]:
    """Return how long streams wait for bursts, in seconds: otherwise, and beside a long prompt."""
    launch, vocab_size = server.launch, server.launch.config.vocab_size
    new_tokens = launch.context - STREAM_PROMPT
    streams = [Answer(time.perf_counter()) for _ in range(launch.slots - 1)]
    prompts = make_prompts(vocab_size, len(streams), STREAM_PROMPT)
    admissions = [Answer(0.0) for _ in range(ADMISSIONS)]

    async def wait_for_bursts() -> None:
        targets = [len(stream.bursts()) + IDLE_BURSTS for stream in streams]
        while any(
            len(stream.bursts()) < target and not stream.ended
            for stream, target in zip(streams, targets, strict=True)
        ):
            await asyncio.sleep(0.005)

    async with connect(server) as client, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(ask(client, launch.body(prompt, new_tokens), stream))
            for stream, prompt in zip(streams, prompts, strict=True)
        ]
        await wait_for_bursts()
        steady = time.perf_counter()
        await wait_for_bursts()
        long_prompts = make_prompts(vocab_size, ADMISSIONS, prompt_len)
        for answer, prompt in zip(admissions, long_prompts, strict=True):
            answer.began = time.perf_counter()
            await ask(client, launch.body(prompt, 1), answer)
            await wait_for_bursts()
        ended = min((s.ended for s in streams if s.ended), default=time.perf_counter())
        for task in tasks:
            task.cancel()
    bursts = [[moment for moment, _ in stream.bursts()] for stream in streams]
    waits = [wait for moments in bursts for wait in itertools.pairwise(moments)]
    figures = compare(waits, steady, ended, [(a.began, a.ended) for a in admissions])
    failed = [answer.error for answer in [*admissions, *streams] if answer.error]
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
    return {
        "idle_s": idle,
        "during_s": beside,
        "max_ratio": beside["max"] / idle["p50"] if idle["p50"] and beside["max"] else None,
        "first_token_s": spread(e - b for b, e in admissions)["p50"],
        "admissions": [[b - steady, e - steady] for b, e in admissions],
        "waits": sorted([b - steady, e - b] for b, e in counted),
    }


def make_report(median: dict[str, Any]) -> str:
    """Return the medians of the rounds as text."""
    rows = [
        {"waits for a burst": name} | {f"{p} ms": scaled(value, 1e3) for p, value in found.items()}
        for name, found in (
            ("otherwise", median["idle_s"]),
            ("beside a long prompt", median["during_s"]),
        )
    ]
    return (
        f"{table(rows)}\n{median['streams']:g} streams; a prompt of "
        f"{median['long_prompt']:,g} tokens is prefilled in {number(median['first_token_s'])} s; "
        f"the longest wait is {number(median['max_ratio'])} times the median otherwise"
    )


def run() -> int:
    """Measure what the flags say; return the exit status."""
    command.check_modules("benchmarks.prefill_interference", ("httpx", "httpx_sse"))
    model, config, checkpoint = command.read_model(FLAGS)
    command.check_dtypes([FLAGS.dtype])
    command.check_room(config, FLAGS.prompt_len + 1)
    if FLAGS.slots < 2:
        raise InputError("--slots is below 2: one streams while another is prefilled")
    path = command.output_path(FLAGS, "prefill-interference", model)
    record = command.start_record("benchmarks.prefill_interference", model, checkpoint)
    # Streams should outlast the long prompts.
    context = min(config.max_seq_len, max(2 * FLAGS.prompt_len, FLAGS.prompt_len + 1024))
    rounds = []
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks_") as name,
        pathlib.Path(f"{path}.log").open("wb") as log,
    ):
        sizes = (pathlib.Path(name), FLAGS.slots, context)
        launch = Launch("ours", FLAGS.dtype, config, checkpoint, *sizes)
        launch.write()
        for _ in range(FLAGS.rounds):
            with running(launch, log) as server:
                rounds.append(asyncio.run(measure(server, FLAGS.prompt_len)))
    row = {"engine": str(launch), "slots": FLAGS.slots, "median": median(rounds), "rounds": rounds}
    print(make_report(row["median"]))
    command.write_record(record | {"prefill_interference": [row]}, path)
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
