"""Measure what else must be equal for equal bits on this machine.

  python -m benchmarks.bits --shape=7b --dtype=bfloat16

A model of random weights answers mixed requests in 8 slots at once. Then it answers them again with
something changed: alone, in another number of slots, with a larger cache, from the prefix cache.
The table says for each change how many requests have other bits in a log-probability, how many have
other tokens, and the first draw that differs; the prefill program computes draw 0. --save in one
process and --against in another compare two processes. docs/design.md, "Exactness", has figures.
"""

import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import command
from benchmarks.report import table
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.weights import filled
from llama_jax import use_compile_cache
from llama_jax.config import ModelConfig
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import DETERMINISM, choose_plan
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.engine.result import Result
from llama_jax.nn.transformer import param_shapes

FLAGS = command.make_flags(
    "7b",
    layers=(2, "Of the shape's layers, how many."),
    dtype=("bfloat16", "Of weights and cache."),
    determinism=("strict", f"{' or '.join(DETERMINISM)}; see run.py --help."),
    mixed=(True, "Some requests are greedy, some filter; otherwise all draw alike."),
    requests=(24, "How many."),
    context=(1024, "Positions of a slot; an answer takes 32."),
    save=("", "File for the answers."),
    against=("", "File of --save: the answers of another process."),
)

CHANGES: dict[str, dict[str, Any]] = {
    "nothing: run again": {},
    "alone": {"alone": True},
    "1 slot": {"slots": 1},
    "2 slots": {"slots": 2},
    "11 slots": {"slots": 11},
    "a cache twice as long": {"longer": 2},
    "from the prefix cache": {"reuse": True},
}

Answer = tuple[list[int], list[list[int]]]
"""Tokens, and the bits of each one's log-probabilities."""


def make_requests(count: int, context: int, vocab_size: int) -> list[GenerationRequest]:
    """Return requests of all prompt lengths."""
    rng = random.Random(2)
    return [
        make_request(
            prompt_tokens=[
                rng.randrange(vocab_size) for _ in range(rng.randrange(4, context - 40))
            ],
            max_tokens=32,
            seed=seed,
            temperature=rng.choice([0, 1]) if FLAGS.mixed else 1,
            top_p=rng.choice([None, 0.9]) if FLAGS.mixed else 0.9,
            logprobs=5,
            ignore_eos=True,
        )
        for seed in range(count)
    ]


def answer(
    config: ModelConfig,
    params: Any,
    requests: Sequence[GenerationRequest],
    *,
    slots: int = 8,
    alone: bool = False,
    longer: int = 1,
    reuse: bool = False,
) -> list[Answer]:
    """Return the answers, in the order of the requests.

    Args:
        config, params: the model.
        requests: what is answered.
        slots: of the engine.
        alone: one request is in the engine at a time; otherwise all are, in random order.
        longer: the cache has so many times the positions that the requests need.
        reuse: each is alone and answered twice, the second time from the prefix cache.
    """
    plan = choose_plan(config, FLAGS.dtype, FLAGS.determinism)
    context = FLAGS.context * longer
    executor = Executor(config, params, FLAGS.dtype, batch=slots, context=context, plan=plan)
    engine = Engine(executor, None, reuse=reuse)
    order = list(range(len(requests)))
    random.Random(slots).shuffle(order)
    groups = [[i] for i in order] if alone or reuse else [order]
    found: dict[int, Answer] = {}
    for group in groups:
        for _ in range(1 + reuse):
            generations = [engine.submit(requests[i]) for i in group]
            while engine.step():
                pass
            for i, generation in zip(group, generations, strict=True):
                found[i] = _bits(generation.result)
    return [found[i] for i in range(len(requests))]


def _bits(result: Result | None) -> Answer:
    assert result is not None  # it has ended
    assert result.logprobs is not None  # it asked for them
    numbers = [[draw.logprob, *(p for _, p in draw.top)] for draw in result.logprobs]
    return list(result.tokens), np.asarray(numbers, np.float32).view(np.int32).tolist()


def compare(changed: str, answers: Iterable[Answer], expected: Sequence[Answer]) -> dict[str, Any]:
    """Return how many answers are not those expected, and the first draw that any differs at."""
    pairs = list(zip(answers, expected, strict=True))
    firsts = [
        next(i for i, (one, other) in enumerate(zip(got[1], want[1], strict=True)) if one != other)
        for got, want in pairs
        if got[1] != want[1]
    ]
    return {
        "changed": changed,
        "requests": len(pairs),
        "other bits": len(firsts),
        "other tokens": sum(got[0] != want[0] for got, want in pairs),
        "first at": min(firsts, default=None),
    }


def run() -> int:
    """Compare what the flags say; return the exit status."""
    command.check_choices("--shape", [FLAGS.shape], SHAPES)
    command.check_dtypes([FLAGS.dtype])
    command.check_choices("--determinism", [FLAGS.determinism], DETERMINISM)
    use_compile_cache()
    whole = load_shape(FLAGS.shape)
    longest = max(how.get("longer", 1) for how in CHANGES.values()) * FLAGS.context
    command.check_room(whole, longest)
    config = dataclasses.replace(whole, num_layers=FLAGS.layers, max_seq_len=longest)
    weights = choose_plan(config, FLAGS.dtype, FLAGS.determinism).weights
    params = jax.tree.map(lambda a: filled(a.shape, a.dtype), param_shapes(config, weights))
    requests = make_requests(FLAGS.requests, FLAGS.context, config.vocab_size)
    path = command.output_path(FLAGS, "bits", FLAGS.shape)
    record = command.start_record("benchmarks.bits", FLAGS.shape, None) | {"rows": []}
    expected = answer(config, params, requests)
    if FLAGS.save:
        pathlib.Path(FLAGS.save).write_text(json.dumps(expected))
    if FLAGS.against:
        text = pathlib.Path(FLAGS.against).read_text()
        saved = [(tokens, bits) for tokens, bits in json.loads(text)]
        record["rows"].append(compare("the process", expected, saved))
    else:
        for changed, how in tqdm(CHANGES.items(), desc="compare"):
            answers = answer(config, params, requests, **how)
            record["rows"].append(compare(changed, answers, expected))
    command.write_record(record, path, plot=False)
    print(table(record["rows"]))
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
