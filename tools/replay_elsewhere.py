"""What replays find between unlike environments: `python -m tools.replay_elsewhere`.

Runs of one process, with the best CPU kernels, are replayed by others: with the kernels for AVX2,
and without kernels. Each verdict must be TOKENS, or DIVERGED with the judgement `tie`. It prints
how many there are of each, and by how much log-probabilities are off, as docs/reproducibility.md
quotes.
"""

import collections
import concurrent.futures
import json
import logging
import math
import multiprocessing
import pathlib
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.nn import cpu_kernels
from llama_jax.receipt import read_receipts
from llama_jax.receipt.file import ReceiptFile
from llama_jax.replay import replay
from llama_jax.replay.check import check_draws
from llama_jax.replay.verdict import Judgement, Outcome

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", str(DEMO_CHECKPOINT), "The model.")
flags.DEFINE_list("dtypes", ["float32", "float16", "bfloat16"], "Each of them.")
flags.DEFINE_integer("requests", 200, "How many runs.", lower_bound=1)

ELSEWHERE = {"avx2": ("avx2",), "no kernels": ()}
"""The sets of kernels of the other processes."""


def requests(count: int) -> Iterator[dict[str, Any]]:
    """Yield mixed requests: all temperatures, filters and penalties."""
    rng = random.Random(0)
    for seed in range(count):
        length = rng.randrange(1, 120)
        request = {
            "prompt_tokens": [1, *(rng.randrange(3, 500) for _ in range(length))],
            "seed": seed,
            "max_tokens": rng.randrange(8, 65),
            "temperature": rng.choice((0, 0.3, 0.6, 1, 1.5, 3)),
            "ignore_eos": True,
        }
        for name, value in {
            "top_k": rng.randrange(1, 51),
            "top_p": rng.uniform(0.2, 1),
            "min_p": rng.uniform(0, 0.1),
            "repetition_penalty": rng.uniform(0.8, 1.4),
            "frequency_penalty": rng.uniform(0, 1),
        }.items():
            if rng.random() < 0.3:
                request[name] = value
        yield request


def draw(checkpoint: str, dtype: str, count: int, path: str) -> str | None:
    """Write the receipts of all runs; return the instruction set."""
    llm = Llama.load(checkpoint, dtype=dtype, slots=8)
    with ReceiptFile(pathlib.Path(path)) as file:
        for result in llm.generate_all(requests(count)):
            file.append(result)
    return cpu_kernels.instruction_set()


def replay_with(
    kernels: tuple[str, ...], checkpoint: str, dtype: str, path: str
) -> tuple[collections.Counter, list[float]]:
    """Return how many runs there are of each finding, and by how much log-probabilities are off."""
    logging.disable()  # that no kernels were found is what was asked for
    cpu_kernels.INSTRUCTION_SETS = kernels
    llm = Llama.load(checkpoint, dtype=dtype, slots=8)
    receipts = list(read_receipts(path))
    found = collections.Counter(
        verdict.outcome.name if verdict.judgement is None else verdict.judgement.name
        for verdict in replay(llm, receipts)
    )
    gaps = [
        abs(recorded.logprob - here.draw.logprob)
        for receipt in receipts
        for recorded, here in zip(
            receipt.draws,
            check_draws(llm, receipt.prompt_tokens, receipt.draws, receipt.parameters),
            strict=True,
        )
    ]
    return found, gaps


def main(_: list[str]) -> None:
    """Print a line of JSON for each dtype and set of kernels; exit 1 if a verdict is another."""
    allowed = {Outcome.EXACT.name, Outcome.TOKENS.name, Judgement.TIE.name}
    are_good = True
    for dtype in FLAGS.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/receipts.jsonl"
            recorded_with = _apart(draw, FLAGS.checkpoint, dtype, FLAGS.requests, path)
            for name, kernels in ELSEWHERE.items():
                found, gaps = _apart(replay_with, kernels, FLAGS.checkpoint, dtype, path)
                figures = {
                    "dtype": dtype,
                    "recorded_with": recorded_with or "no kernels",
                    "replayed_with": name,
                    **dict(found.most_common()),
                    "draws": len(gaps),
                    "logprob_gap_rms": math.sqrt(statistics.fmean(gap**2 for gap in gaps)),
                    "logprob_gap_max": max(gaps),
                }
                print(json.dumps(figures), flush=True)
                are_good &= set(found) <= allowed
    if not are_good:
        sys.exit(1)


def _apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own: kernels are chosen once in each."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    app.run(main)
