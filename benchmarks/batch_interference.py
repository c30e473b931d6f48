"""Measure batch interference: the time to first token of live requests beside a stored batch.

  python -m benchmarks.batch_interference --shape=300m --rate=0.5

Live requests come at random (Poisson) times, first without and then beside a batch whose lines
keep all other slots busy, in turns; their 99th percentiles are compared. See benchmarks/README.md.
"""

import asyncio
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

from benchmarks import command
from benchmarks.load import Answer, ask, connect, make_prompts, median, poisson
from benchmarks.report import number, scaled, table
from benchmarks.servers import Launch, Server, running
from benchmarks.turns import percentile
from benchmarks.worker import EngineError
from llama_jax.card import schemas as card

LINES = 400
"""Of a batch; what a round does not need is cancelled."""

FLAGS = command.make_flags(
    "300m",
    **command.SERVED,
    slots=(8, "Of the server."),
    prompt_len=(128, "Tokens of a live prompt, and of a line's."),
    new_tokens=(32, "Tokens of a live answer."),
    line_tokens=(128, "Tokens of a line's answer."),
    requests=(100, "Live requests of each measurement."),
    rate=("0.5", "Live requests a second."),
    batch_slots=("all", "The server's --batch_slots; all: those that no live request needs."),
    rounds=(3, "Times that both are measured."),
)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent."""

    prompt_len: int
    new_tokens: int
    line_tokens: int
    requests: int
    rate: float


async def measure(server: Server, load: Load, seed: int) -> dict[str, Any]:
    """Return the 99th percentiles of the time to first token, without a batch and beside one."""
    async with connect(server) as client:
        alone = await _live(client, server, load, seed)
        batch_id = await _create_batch(client, server, load, seed)
        while (await _get(client, batch_id))["status"] == "validating":
            await asyncio.sleep(0.05)
        before = await _get(client, batch_id)
        beside = await _live(client, server, load, seed + 1)
        after = await _get(client, batch_id)
        await client.post(f"/v1/batches/{batch_id}/cancel")
        while (await _get(client, batch_id))["status"] not in ("cancelled", "completed"):
            await asyncio.sleep(0.05)
    lines = after["request_counts"]["completed"] - before["request_counts"]["completed"]
    if after["status"] != "in_progress":
        raise EngineError(f"the batch ended before the live requests: {after['status']}")
    ratio = beside["p99_s"] / alone["p99_s"]
    return {"alone": alone, "beside": beside, "p99_ratio": ratio, "lines": lines}


async def _live(client: Any, server: Server, load: Load, seed: int) -> dict[str, float]:
    """Send live requests at their times; return figures of the time to first token, in seconds."""
    vocab_size = server.launch.config.vocab_size
    prompts = make_prompts(vocab_size, load.requests, load.prompt_len, seed=seed)
    began = time.perf_counter()

    async def send(at: float, prompt: list[int]) -> float:
        await asyncio.sleep(max(0, began + at - time.perf_counter()))
        answer = Answer(time.perf_counter())
        await ask(client, server.launch.body(prompt, load.new_tokens), answer)
        if answer.error:
            raise EngineError(f"a live request failed: {answer.error}")
        return answer.bursts()[0][0] - answer.began

    times = poisson(load.rate, load.requests, seed)
    waits = await asyncio.gather(*map(send, times, prompts))
    return {f"p{p}_s": percentile(waits, p) for p in (50, 90, 99)}


async def _create_batch(client: Any, server: Server, load: Load, seed: int) -> str:
    vocab_size = server.launch.config.vocab_size
    lines = []
    for i, prompt in enumerate(make_prompts(vocab_size, LINES, load.prompt_len, seed=seed + 1000)):
        body = server.launch.body(prompt, load.line_tokens) | {"model": card.MODEL}
        del body["stream"], body["stream_options"]
        row = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        lines.append(json.dumps(row))
    upload = {"file": ("input.jsonl", "\n".join(lines).encode())}
    file = await client.post("/v1/files", files=upload, data={"purpose": "batch"})
    fields = {"endpoint": "/v1/completions", "completion_window": "24h"}
    batch = await client.post("/v1/batches", json=fields | {"input_file_id": file.json()["id"]})
    if batch.status_code != 200:
        raise EngineError(f"the batch was refused: {batch.text[:200]}")
    return batch.json()["id"]


async def _get(client: Any, batch_id: str) -> dict[str, Any]:
    return (await client.get(f"/v1/batches/{batch_id}")).json()


def make_report(found: dict[str, Any]) -> str:
    """Return the medians of the rounds as text."""
    rows = [
        {"time to first token": name}
        | {f"p{p} ms": scaled(found[key][f"p{p}_s"], 1e3) for p in (50, 90, 99)}
        for name, key in (("without a batch", "alone"), ("beside a batch", "beside"))
    ]
    return (
        f"{table(rows)}\n{found['lines']:g} lines were answered meanwhile; the 99th percentile is "
        f"{number(found['p99_ratio'])} times that without a batch"
    )


def run() -> int:
    """Measure what the flags say; return the exit status."""
    command.check_modules("benchmarks.batch_interference", ("httpx", "httpx_sse"))
    model, config, checkpoint = command.read_model(FLAGS)
    command.check_dtypes([FLAGS.dtype])
    context = FLAGS.prompt_len + max(FLAGS.new_tokens, FLAGS.line_tokens)
    command.check_room(config, context)
    path = command.output_path(FLAGS, "batch-interference", model)
    record = command.start_record("benchmarks.batch_interference", model, checkpoint)
    load = Load(
        *(FLAGS.prompt_len, FLAGS.new_tokens, FLAGS.line_tokens, FLAGS.requests),
        rate=float(FLAGS.rate),
    )
    rounds = []
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks_") as name,
        pathlib.Path(f"{path}.log").open("wb") as log,
    ):
        more = [f"--batch_dir={name}/batches"]
        more += [f"--batch_slots={FLAGS.batch_slots}"] if FLAGS.batch_slots != "all" else []
        sizes = (pathlib.Path(name), FLAGS.slots, context)
        launch = Launch("ours", FLAGS.dtype, config, checkpoint, *sizes, more=tuple(more))
        launch.write()
        with running(launch, log) as server:
            for i in range(FLAGS.rounds):
                rounds.append(asyncio.run(measure(server, load, 2 * i)))
    row = {"engine": str(launch), "slots": FLAGS.slots, "median": median(rounds), "rounds": rounds}
    print(make_report(row["median"]))
    command.write_record(record | {"batch_interference": [row]}, path, plot=False)
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
