"""What replays find between unlike environments: `python -m tools.replay_elsewhere`.

Runs of one process, with the best CPU kernels, are replayed by others: with the kernels for AVX2,
and without kernels. To compare machines, write the receipts on one and replay them on the other:

  python -m tools.replay_elsewhere --receipts=FOLDER   # there is no such folder: written to it
  python -m tools.replay_elsewhere --receipts=FOLDER   # on the other machine: replayed

Each verdict must be TOKENS, or DIVERGED with the judgement `tie`. It prints how many there are of
each, and by how much log-probabilities are off, as docs/reproducibility.md quotes.
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

import jax
from absl import app, flags
from absl import logging as absl_logging

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
flags.DEFINE_string(
    "receipts", "", "Folder of a file per dtype: written, or if it exists replayed."
)
flags.DEFINE_integer("slots", 8, "Of the engine that draws or replays.", lower_bound=1)

ELSEWHERE = {"avx2": ("avx2",), "no kernels": ()}
"""The sets of kernels of the other processes."""
EXPECTED = {Outcome.EXACT.name, Outcome.TOKENS.name, Judgement.TIE.name}


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


def draw(checkpoint: str, dtype: str, slots: int, count: int, path: str) -> str:
    """Write the receipts of all runs; return the name of what computed them."""
    llm = Llama.load(checkpoint, dtype=dtype, slots=slots)
    with ReceiptFile(pathlib.Path(path)) as file:
        for result in llm.generate_all(requests(count)):
            file.append(result)
    return computed_by()


def computed_by() -> str:
    """Return the name of the device, or of the CPU kernels' instruction set."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return cpu_kernels.instruction_set() or "no kernels"


def replay_with(
    kernels: tuple[str, ...], checkpoint: str, dtype: str, slots: int, path: str
) -> dict[str, Any]:
    """Return how many runs there are of each finding, and by how much log-probabilities are off."""
    logging.disable()  # that no kernels were found is what was asked for
    cpu_kernels.INSTRUCTION_SETS = kernels
    llm = Llama.load(checkpoint, dtype=dtype, slots=slots)
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
    return {
        "dtype": dtype,
        "replayed_with": computed_by(),
        "slots": slots,
        **dict(found.most_common()),
        "draws": len(gaps),
        "logprob_gap_rms": math.sqrt(statistics.fmean(gap**2 for gap in gaps)),
        "logprob_gap_max": max(gaps),
    }


def report(figures: dict[str, Any], recorded_with: str) -> bool:
    """Print a line of JSON; return whether each verdict is one of those that are expected."""
    print(json.dumps({"recorded_with": recorded_with, **figures}), flush=True)
    others = {*Outcome.__members__, *Judgement.__members__} - EXPECTED
    return others.isdisjoint(figures)


def write_or_replay(folder: pathlib.Path) -> bool:
    """Write a file of receipts for each dtype, or replay those there; return as `report` does."""
    whole = folder / "recorded_with"  # written last
    if not whole.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in FLAGS.dtypes:
            path = folder / f"{dtype}.jsonl"
            path.unlink(missing_ok=True)  # of a run that was stopped
            draw(FLAGS.checkpoint, dtype, FLAGS.slots, FLAGS.requests, str(path))
        whole.write_text(computed_by())
        return True
    recorded_with = whole.read_text()
    are_good = True
    for dtype in FLAGS.dtypes:
        model = (FLAGS.checkpoint, dtype, FLAGS.slots)
        figures = replay_with(cpu_kernels.INSTRUCTION_SETS, *model, str(folder / f"{dtype}.jsonl"))
        are_good &= report(figures, recorded_with)
    return are_good


def replay_here() -> bool:
    """Draw with the best kernels, replay with each other set; return as `report` does."""
    are_good = True
    for dtype in FLAGS.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            model = (FLAGS.checkpoint, dtype, FLAGS.slots)
            path = f"{folder}/receipts.jsonl"
            recorded_with = _apart(draw, *model, FLAGS.requests, path)
            for name, kernels in ELSEWHERE.items():
                figures = _apart(replay_with, kernels, *model, path)
                are_good &= report(figures | {"replayed_with": name}, recorded_with)
    return are_good


def main(_: list[str]) -> None:
    """Print a line of JSON for each comparison; exit 1 if a verdict is not expected."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    folder = FLAGS.receipts
    if not (write_or_replay(pathlib.Path(folder)) if folder else replay_here()):
        sys.exit(1)


def _apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own: kernels are chosen once in each."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    app.run(main)
