"""Delivery: a generation gets the tokens that were drawn for it."""

from collections.abc import Sequence
from typing import Any

from llama_jax.decode.sampling import DIRTY, NO_TOKEN, NOT_FINITE
from llama_jax.engine.counts import Counts
from llama_jax.engine.draw import Draw
from llama_jax.engine.generation import token_logprobs
from llama_jax.engine.pipeline import Column, InFlight


class NotFiniteError(ArithmeticError):
    """The model's logits have a NaN or an infinity, so there is no token to draw."""


def tokens_of(column: Column, results: InFlight) -> list[int]:
    """Return what was drawn in a column; NOT_FINITE may be the last. Note what drafts left."""
    # Once a slot is done it stays so, and where a draft is rejected the rest is not drawn: the
    # first entries are the column's own.
    tokens = results.tokens[:, column.index].tolist()
    if DIRTY in tokens:
        column.slot.is_dirty, column.slot.cached = True, []
    return [token for token in tokens if token not in (NO_TOKEN, DIRTY)]


def hand_over(column: Column, results: InFlight, counts: Counts) -> None:
    """Give a generation its next tokens, up to the one that ends it.

    Args:
        column: whose tokens.
        results: what was drawn.
        counts: gets the number of tokens.

    Raises:
        NotFiniteError: there was none to draw.
    """
    generation, parameters = column.generation, column.generation.request.parameters
    own, measures = tokens_of(column, results), results.measures[:, column.index]
    scores: Sequence[Any] = [None] * len(own)
    if parameters.logprobs is not None:
        assert results.logprobs is not None
        scores = token_logprobs(results.logprobs, column.index, own, parameters.logprobs)
    for token, logprob, measured in zip(own, scores, measures.tolist(), strict=False):
        if token == NOT_FINITE:
            raise NotFiniteError(
                f"the logits of output token {len(generation.tokens)} have a NaN or an "
                "infinity, so none can be drawn: the weights have one, a repetition penalty is "
                "near 0, or a value exceeds the dtype; use bfloat16 or float32"
            )
        counts.tokens += 1
        generation.push(Draw(token, *measured), logprob)
        if generation.result is not None:
            break
