"""The verb compare: two files of receipts, or models, over the same requests."""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from llama_jax.card import contract
from llama_jax.cli.comparison_plot import plot_pairs
from llama_jax.cli.console import indented_json, note
from llama_jax.cli.files import expand, read_bytes
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.keys import read_public_key
from llama_jax.cli.model import load_model
from llama_jax.engine.request import GenerationRequest
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.progress import progress_bar
from llama_jax.receipt.reading import Receipt, read_receipts, read_statement
from llama_jax.replay.compare import (
    Pair,
    compare_receipts,
    compare_with_model,
    figures,
    logits_of,
)

_SETTINGS = ("dtype", "devices", "determinism")
_NAMES = {
    "token_agreement": "token agreement",
    "runs_without_divergence": "runs without divergence",
    "first_divergence_median": "first divergence (median draw)",
    "logprob_gap_mean": "log-probability gap, mean (nats)",
    "logprob_gap_max": "log-probability gap, max (nats)",
    "token_difr": "Token-DiFR",
    "kl_mean": "KL divergence, mean (nats)",
    "kl_max": "KL divergence, max (nats)",
}


class Side(NamedTuple):
    """What one operand names."""

    path: pathlib.Path
    settings: dict[str, Any]
    """Arguments of `Llama.load`, of a checkpoint."""

    @property
    def is_model(self) -> bool:
        """Whether it is a checkpoint; else it is a file of receipts."""
        return self.path.is_dir()

    def load(self) -> Llama:
        """Load the checkpoint."""
        return load_model(8, checkpoint=self.path, **self.settings)


def compare(first: str, second: str) -> None:
    """Print how far two sides agree.

    Args:
        first, second: each a file of receipts, or a checkpoint with settings after commas.
    """
    if FLAGS.output not in ("text", "json"):
        raise InputError(f"--output is {FLAGS.output!r:.40}, expected text or json")
    sides = parse_side(first), parse_side(second)
    if sides[0].is_model and not sides[1].is_model:
        sides = sides[1], sides[0]  # the receipts are what was drawn
    if sides[0].is_model == (FLAGS.input is None):
        reason = "two models need --input, a file of requests" if sides[0].is_model else ""
        raise InputError(reason or "--input is given with a file of receipts, which has requests")
    pairs = list(_pairs(*sides))
    found = figures(pairs)
    if FLAGS.output == "json":
        print(indented_json(found))
    else:
        for name, value in found.items():
            if value is not None:
                shown = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
                print(f"{_NAMES.get(name, name):<34}{shown:>12}")
    if FLAGS.plot is not None:
        plot_pairs(pairs, expand(FLAGS.plot, "--plot"))
        note(f"wrote {FLAGS.plot}")


def parse_side(text: str) -> Side:
    """Return what an operand names: a path, and after commas settings of a checkpoint.

    Raises:
        InputError: there is nothing of that name, or a setting is unknown.
    """
    name, *given = text.split(",")
    path = expand(name, name)
    if not path.exists():
        raise InputError(f"{name} does not exist, expected a file of receipts or a checkpoint")
    settings: dict[str, Any] = {}
    for part in given:
        key, _, value = part.partition("=")
        if key not in _SETTINGS or not value:
            raise InputError(
                f"{text!r:.80} has {part!r:.40}, expected {', '.join(_SETTINGS)} with a value, "
                "such as DIR,dtype=bfloat16"
            )
        settings[key] = int(value) if value.isdigit() else value
    if settings and not path.is_dir():
        raise InputError(f"{name} is a file of receipts, which has no settings; drop {given[0]}")
    return Side(path, settings)


def _pairs(first: Side, second: Side) -> Iterator[Pair]:
    """Yield a pair for each request."""
    key = read_public_key()
    if first.is_model:
        if key is not None:
            raise InputError("--key is given, and no side is a file of receipts; drop it")
        yield from _compare_models(first, second)
    elif second.is_model:
        receipts = list(read_receipts(first.path, key))
        bar = progress_bar(receipts, unit="run")
        yield from compare_with_model(bar, second.load(), [None] * len(receipts))
    else:
        yield from compare_receipts(
            list(read_receipts(first.path, key)), list(read_receipts(second.path, key))
        )


def _compare_models(first: Side, second: Side) -> Iterator[Pair]:
    """Run the requests on one model, then check them on the other; one is loaded at a time."""
    requests = list(_requests(FLAGS.input))
    with tempfile.TemporaryDirectory() as folder:  # logits of many runs may exceed the memory
        files = [pathlib.Path(folder) / f"{i}.npy" for i in range(len(requests))]
        receipts: list[Receipt] = []
        llm = first.load()
        bar = progress_bar(llm.generate_all(requests), total=len(requests), unit="run")
        for file, result in zip(files, bar, strict=True):
            receipts.append(read_statement(result.receipt(), "this run"))
            np.save(file, logits_of(receipts[-1], llm))
        del llm, bar
        bar = progress_bar(receipts, unit="run")
        yield from compare_with_model(bar, second.load(), map(np.load, files))


def _requests(path: str) -> Iterator[GenerationRequest]:
    """Yield the requests of a file."""
    for number, line in enumerate(read_bytes(path, f"--input={path}").splitlines(), start=1):
        if line.strip():
            try:
                fields = contract.parse_body(line, "the request")
                yield contract.check_extended(fields).request()
            except InputError as error:
                raise InputError(f"--input={path}, line {number}: {error}") from None
