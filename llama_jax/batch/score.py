"""Lines of texts to score, and the sums over all of their results."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from llama_jax.batch.line import Format
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Result
from llama_jax.engine.score import Likelihood, Score
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.regular_file import open_regular

_FIELDS = ("text", "continuation", "parse_control")
_SUMMED = {"num_bytes", "logprob", "num_tokens", "is_greedy", "fingerprint"}


class ScoreForm:
    """A line with a `text`, and optionally its `continuation`: strings, or lists of token ids.

    Other fields are without effect.

    Args:
        fields: the line's.
        llm: the model.
        stride: see `Llama.score`.
        logprobs: put the tokens and their log-probabilities into the output.

    Raises:
        InputError: see `Llama.score`.
    """

    def __init__(self, fields: Any, llm: Llama, *, stride: int | None, logprobs: bool):
        if not isinstance(fields, dict) or fields.get("text") is None:
            raise InputError(f"the line is {fields!r:.40}, expected an object with `text`")
        parse_control = fields.get("parse_control") or False
        if not isinstance(parse_control, bool):
            raise InputError(f"parse_control is {parse_control!r:.40}, expected true or false")
        self._request = llm.score_request(
            fields["text"], fields.get("continuation"), stride=stride, parse_control=parse_control
        )
        self._logprobs = logprobs
        self.requests: list[GenerationRequest] = self._request.requests
        self.ignored = [name for name in fields if name not in _FIELDS]

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """Return the figures as the command line's JSON has them."""
        return {"result": score_figures(self._request.score(results), logprobs=self._logprobs)}


def score_format(*, stride: int | None, logprobs: bool) -> Callable[[Any], Format]:
    """Return what tells `Batch` that every line is a text to score; see `ScoreForm`."""
    made = Format(functools.partial(ScoreForm, stride=stride, logprobs=logprobs))
    return lambda fields: made


def figures(likelihood: Likelihood) -> dict[str, Any]:
    """Return the figures of a likelihood in JSON's types; an infinite perplexity is null."""
    perplexity = likelihood.perplexity
    return {
        "num_tokens": likelihood.num_tokens,
        "num_bytes": likelihood.num_bytes,
        "logprob": likelihood.logprob,
        "nats_per_token": likelihood.nats_per_token,
        "perplexity": perplexity if math.isfinite(perplexity) else None,
        "bits_per_byte": likelihood.bits_per_byte,
    }


def score_figures(score: Score, *, logprobs: bool) -> dict[str, Any]:
    """Return what is known of one text in JSON's types, its tokens only with `logprobs`."""
    row = figures(score)
    if logprobs:
        row |= {"tokens": score.tokens, "token_logprobs": score.token_logprobs}
    return row | {
        "is_greedy": score.is_greedy,
        "fingerprint": score.fingerprint,
        "warnings": score.warnings,
        "quantization": score.quantization,
    }


@dataclasses.dataclass(frozen=True)
class Total:
    """Of all results in a file."""

    likelihood: Likelihood | None
    """None: there are no results."""
    texts: int
    greedy: int
    """Texts whose tokens are each the most likely one at its place."""
    fingerprints: set[str]


def read_total(output: pathlib.Path) -> Total:
    """Add up the results in a file that `Batch` has written; lines with an error do not count.

    Raises:
        InputError: they are no scores: the verb `batch` wrote them.
    """
    with open_regular(output) as lines:
        rows = [row["result"] for row in map(json.loads, lines) if "result" in row]
    if not all(isinstance(row, dict) and row.keys() >= _SUMMED for row in rows):
        raise InputError(f"{output} has results that are no scores of texts; name a new file")
    sizes = [row["num_bytes"] for row in rows]
    likelihood = Likelihood(
        logprob=math.fsum(row["logprob"] for row in rows),
        num_tokens=sum(row["num_tokens"] for row in rows),
        num_bytes=None if None in sizes else sum(sizes),
    )
    return Total(
        likelihood=likelihood if rows else None,
        texts=len(rows),
        greedy=sum(row["is_greedy"] for row in rows),
        fingerprints={row["fingerprint"] for row in rows},
    )
