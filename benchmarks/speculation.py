"""Measure decoding with drafts against decoding without, in turns.

  python -m benchmarks.speculation --shape=1b --dtype=float16
  python -m benchmarks.speculation --checkpoint=DIR --draft=DIR --texts=FILE

The requests are answered without drafts first, and these answers are recorded. Then each round
answers them again in every way, the order reversed every time. `ngram` is --speculate=ngram, and
`model` is --speculate=DIR, with --draft. `n accepted` drafts from the record, so that n drafts of
every pass are right and the next is wrong: what a pass costs, and gains, at that acceptance. Random
weights will do. `none accepted` drafts wrong tokens in every turn, and the engine decides, as it
does for ngram: the price of hopeless drafts. --texts has a prompt a line, such as texts to be
copied.
"""

import functools
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import command
from benchmarks.report import table
from benchmarks.weights import make_weights
from llama_jax import use_compile_cache
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import choose_plan
from llama_jax.drafters import check_speculation, open_drafter
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.engine import Engine
from llama_jax.engine.generation import Generation
from llama_jax.engine.ngrams import NgramDrafter
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.engine.slots import Slot
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.checkpoint import Checkpoint

FLAGS = command.make_flags(
    "1b",
    checkpoint=command.CHECKPOINT,
    dtype=("float16", "Of weights and cache."),
    draft=("", "Checkpoint of a draft model, of the same vocabulary."),
    texts=("", "File with a prompt a line; default: random ids."),
    slots=(["1"], "Answers at once, one or more numbers."),
    tokens=(3, "Drafts of a pass: --speculate_tokens of run.py."),
    prompt_len=(64, "Ids of a random prompt."),
    new_tokens=(128, "Tokens of each answer."),
    rounds=(5, "How often every way is measured."),
)
flags.DEFINE_float("temperature", 0.0, "Of the requests.", flag_values=FLAGS)

WITHOUT = "without"

Run = dict[str, Any]


class FromRecord(Drafter):
    """Draft from recorded answers.

    Args:
        answers: the tokens of each request, by its seed.
        accepted: drafts of each pass that are right.
        vocab_size: wrong ones are below it.
        is_eager: see `Drafter`.
    """

    is_free = True

    def __init__(
        self, answers: dict[int, list[int]], accepted: int, vocab_size: int, *, is_eager: bool
    ):
        self._answers, self._accepted, self._vocab_size = answers, accepted, vocab_size
        self.is_eager = is_eager

    def draft(self, slots: Sequence[Slot], count: int) -> list[list[int]]:
        """Return what the record has next, and wrong tokens after the right ones."""
        return [self._draft(slot.generation, count) for slot in slots]

    def _draft(self, generation: Generation | None, count: int) -> list[int]:
        assert generation is not None
        answer = self._answers[generation.request.parameters.seed]
        begin = len(generation.tokens)
        following = (answer[begin : begin + count] + [0] * count)[:count]
        return [
            token if place < self._accepted else (token + 1) % self._vocab_size
            for place, token in enumerate(following)
        ]


def make_requests(
    count: int, vocab_size: int, tokenizer: Tokenizer | None
) -> list[GenerationRequest]:
    """Return the requests that are answered at once, each with a seed of its own."""
    rng = random.Random(0)
    common = {
        "max_tokens": FLAGS.new_tokens,
        "temperature": FLAGS.temperature,
        "ignore_eos": True,
    }
    if not FLAGS.texts:
        ids = [
            [rng.randrange(3, vocab_size) for _ in range(FLAGS.prompt_len)] for _ in range(count)
        ]
        return [make_request(prompt_tokens=own, seed=i, **common) for i, own in enumerate(ids)]
    if tokenizer is None:
        raise InputError("--texts is given, but the weights have no tokenizer; give --checkpoint")
    lines = pathlib.Path(FLAGS.texts).read_text("utf-8").splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"--texts={FLAGS.texts} has no line of text; write a prompt a line")
    return [
        make_request(prompt=texts[i % len(texts)], seed=i, **common)
        for i in range(max(count, len(texts)))
    ]


def answer(engine: Engine, requests: Sequence[GenerationRequest]) -> Run:
    """Answer requests, as many at once as there are slots; return the tokens and the time.

    What counts is the time after their prompts were read, if all have a slot at once.
    """
    generations = [engine.submit(request) for request in requests]
    while len(requests) <= engine.executor.batch and not all(g.tokens for g in generations):
        engine.step()
    drawn, began = sum(len(g.tokens) for g in generations), time.perf_counter()
    while engine.step():
        pass
    seconds = time.perf_counter() - began
    results = [generation.result for generation in generations]
    return {
        "tokens": {g.request.parameters.seed: list(g.tokens) for g in generations},
        "rate": (sum(len(g.tokens) for g in generations) - drawn) / seconds,
        "passes": [result.speculation for result in results if result and result.speculation],
    }


def make_drafters(
    answers: dict[int, list[int]], checkpoint: Checkpoint, executor: Executor
) -> dict[str, Drafter]:
    """Return what drafts in each way, by name."""
    vocab_size = checkpoint.config.vocab_size
    from_record = functools.partial(FromRecord, answers, vocab_size=vocab_size)
    drafters: dict[str, Drafter] = {"ngram": NgramDrafter()}
    if FLAGS.draft:
        model = open_drafter(FLAGS.draft, executor, checkpoint, "strict")
        assert model is not None
        drafters["model"] = model
    drafters["none accepted"] = from_record(accepted=0, is_eager=False)
    for accepted in range(FLAGS.tokens + 1):
        drafters[f"{accepted} accepted"] = from_record(accepted=accepted, is_eager=True)
    return drafters


def measure(checkpoint: Checkpoint, slots: int) -> list[dict[str, Any]]:
    """Return a row for each way, with this many answers at once."""
    config, dtype = checkpoint.config, checkpoint.dtype
    tokenizer = checkpoint.tokenizer and Tokenizer(checkpoint.tokenizer)
    requests = make_requests(slots, config.vocab_size, tokenizer)
    longest = max(len(request.encode(tokenizer, config.vocab_size)) for request in requests)
    context = longest + FLAGS.new_tokens
    command.check_room(config, context)
    plan = choose_plan(config, dtype)
    make = functools.partial(
        Executor, config, checkpoint.params, dtype, batch=slots, context=context
    )
    plain, drafting = make(plan=plan), make(plan=plan.speculating(FLAGS.tokens))

    without = Engine(plain, tokenizer, reuse=False)
    expected = answer(without, requests)["tokens"]
    # One for all rounds: it learns what passes cost.
    engines = {WITHOUT: without} | {
        name: Engine(drafting, tokenizer, drafter=drafter, reuse=False)
        for name, drafter in make_drafters(expected, checkpoint, drafting).items()
    }
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for engine in engines.values():  # compiles
        answer(engine, requests)
    for round_ in range(FLAGS.rounds):
        for name in list(engines)[:: -1 if round_ % 2 else 1]:
            runs[name].append(answer(engines[name], requests))
    return [_row(name, slots, own, runs[WITHOUT], expected) for name, own in runs.items()]


def _row(
    name: str, slots: int, runs: Sequence[Run], without: Sequence[Run], expected: dict[int, Any]
) -> dict[str, Any]:
    """Return the medians of a way."""
    ratios = [one["rate"] / base["rate"] for one, base in zip(runs, without, strict=True)]
    passes = [each for run in runs for each in run["passes"]]
    count = sum(each.passes for each in passes)
    drawn = sum(each.passes * each.tokens_per_pass for each in passes)
    drafted = sum(each.drafted for each in passes)
    accepted = sum(each.accepted for each in passes)
    others = [run["tokens"][seed] != expected[seed] for run in runs for seed in expected]
    return {
        "drafts": name,
        "slots": slots,
        "tokens/s": round(statistics.median(run["rate"] for run in runs), 2),
        "times as fast": round(statistics.median(ratios), 3),
        "tokens a pass": round(drawn / count, 2) if count else 1.0,
        "accepted": round(accepted / drafted, 3) if drafted else None,
        "other answers": sum(others),
    }


def run() -> int:
    """Measure what the flags say; return the exit status: 1 if with drafts an answer differs."""
    command.check_dtypes([FLAGS.dtype])
    check_speculation("ngram", FLAGS.tokens)
    model, config, weights = command.read_model(FLAGS)
    counts = command.read_numbers(FLAGS, "slots")
    use_compile_cache()
    checkpoint = make_weights(config, FLAGS.dtype, weights)
    path = command.output_path(FLAGS, "speculation", model)
    record = command.start_record("benchmarks.speculation", model, weights) | {"rows": []}
    for slots in counts:
        record["rows"] += measure(checkpoint, slots)
    command.write_record(record, path, plot=False)
    print(table(record["rows"]))
    # Without the kernels a token may be another one where two are as good as equal.
    invariant = choose_plan(config, FLAGS.dtype).batch_invariant
    return int(invariant and any(row["other answers"] for row in record["rows"]))


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
