"""Comparison: how far a checkpoint is from the one that it was made of, on a text."""

import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.engine.score import ScoreRequest
from llama_jax.llama import Llama
from llama_jax.weights.checkpoint import open_checkpoint

CONTEXT = 2048
"""Tokens of a window, at most."""

MOST_TOKENS = 4096
"""Of a text; the rest is left out. Their logits are in memory."""

_ROWS = 128  # in float64 at a time

SAMPLE = """\
Once upon a time there was a little girl called Mia. She lived in a small house near the sea \
with her mother, her father and a brown dog. Every morning Mia and the dog ran down to the \
beach to look for shells. One day they found a green bottle in the sand. There was a piece of \
paper in it. "Look!" said Mia. "It is a letter." The dog barked and wagged his tail.

Mia took the bottle home and showed it to her father. He opened it with care and read the \
letter. It came from a boy on an island far away. He wrote that he had no friends there, and \
that he liked to draw boats. Mia was sad for the boy. She sat down at the table and drew a \
picture of her dog. Then she wrote: "Hello! I am your friend now." She put the picture into \
the bottle and closed it.

The next day the wind was strong and the sea was loud. Mia held her mother's hand and threw \
the bottle as far as she could. They watched it until it was very small. Many weeks went by. \
Then, one morning, there was a new bottle on the beach. In it was a picture of a big boat, and \
on the boat stood a girl and a brown dog. Mia was very happy. She put the picture on the wall \
above her bed, and every night she looked at it before she went to sleep.
"""
"""The text that is taken where none is named."""


class Comparison(NamedTuple):
    """Of the model before and after."""

    before: float
    """Perplexity, as `run.py score` has it."""
    after: float
    kl: float
    """The mean divergence of the predictions after from those before, in nats for each token."""
    num_tokens: int
    left_out: int
    """Tokens of the text beyond MOST_TOKENS."""

    def __str__(self) -> str:
        change = self.after / self.before - 1
        more = f"; its other {self.left_out:,} were left out" if self.left_out else ""
        return (
            f"perplexity {self.before:,.4f} before, {self.after:,.4f} after ({change:+.2%}); KL "
            f"divergence {self.kl:.6f} nats a token; on {self.num_tokens:,} tokens{more}"
        )


def compare(before: pathlib.Path, after: pathlib.Path, text: str) -> Comparison:
    """Load two checkpoints of one vocabulary, one after the other, and compare them on a text.

    Raises:
        InputError: see `Llama.load` and `Llama.score`: there is no room, or nothing to score.
    """
    llm = _load(before)
    whole = llm.score_request(text).tokens
    request = llm.score_request(whole[:MOST_TOKENS])
    first = llm.score(request.tokens)
    logits = list(_windows(llm, request))
    del llm  # before the next is loaded
    llm = _load(after)
    second = llm.score(request.tokens)
    divergences = (
        divergence
        for pair in zip(logits, _windows(llm, request), strict=True)
        for divergence in _divergences(*pair)
    )
    kl = math.fsum(divergences) / first.num_tokens
    left_out = len(whole) - len(request.tokens)
    return Comparison(first.perplexity, second.perplexity, kl, first.num_tokens, left_out)


def _load(path: pathlib.Path) -> Llama:
    _, config = open_checkpoint(path)
    return Llama.load(path, context=min(CONTEXT, config.max_seq_len))


def _windows(llm: Llama, request: ScoreRequest) -> Iterator[np.ndarray]:
    """Yield the logits from which a text's tokens are predicted, window by window."""
    for begin, end, target in request.windows:
        yield llm.logits(request.tokens[begin:end])[target - begin - 1 : -1]


def _divergences(before: np.ndarray, after: np.ndarray) -> Iterator[float]:
    """Yield the Kullback-Leibler divergence of each row of logits from the row before."""
    for begin in range(0, len(before), _ROWS):
        p, q = (_log_softmax(logits[begin : begin + _ROWS]) for logits in (before, after))
        yield from (np.exp(p) * (p - q)).sum(axis=1).tolist()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
