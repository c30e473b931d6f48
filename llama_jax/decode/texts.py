"""Whole texts, read at once, on a cache of their own: their logits, and draws that are checked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama_jax.decode import sampling
from llama_jax.decode.needs import Needs
from llama_jax.decode.sampling import AnyArray, SamplingParams
from llama_jax.decode.steps import MEASURES, measures_of, without_infinities
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Params, Transformer, forward


class Law(NamedTuple):
    """How a text's tokens were drawn; see `state.DecodeState`."""

    sampling: SamplingParams
    """Of shape [1]."""
    bias: Float[AnyArray, "V"]
    in_prompt: Bool[AnyArray, "V"]


class CheckedDraws(NamedTuple):
    """What the law draws after each token of a text, and what it makes of the token that follows.

    Rows before the prompt's last token mean nothing.
    """

    tokens: Int[AnyArray, "T"]
    """That the law draws; NOT_FINITE where there is nothing to draw."""
    measures: Float[AnyArray, "T 5"]
    """`steps.MEASURES`: the log-probability is that of the token that follows in the text."""
    deficits: Float[AnyArray, "T"]
    """The best score less that of the token that follows, 0 where they are one; infinity where a
    filter cuts it."""


def logits_of_text(
    model: Transformer,
    params: Params,
    cache: kv.KVCache,
    start: Int[Array, ""],
    tokens: Int[Array, "T"],
    *,
    attend_len: int,
) -> tuple[kv.KVCache, Float[Array, "T V"]]:
    """Return the logits at every position of one chunk of a single text; the cache is donated."""
    logits, cache = forward(
        model, params, tokens[None, :], start[None], cache, attend_len=attend_len
    )
    return cache, logits[0]


def check_draws(
    model: Transformer,
    params: Params,
    cache: kv.KVCache,
    counts: Int[Array, "V"],
    start: Int[Array, ""],
    tokens: Int[Array, "T"],
    following: Int[Array, "T"],
    num_prompt: Int[Array, ""],
    law: Law,
    *,
    needs: Needs,
    attend_len: int,
    drawable: int | None = None,
) -> tuple[kv.KVCache, CheckedDraws]:
    """Draw again at every position of one chunk of a text, whose tokens stay what they are.

    One position after the other, as a decode step draws: on a CPU in an eighth of the time of all
    at once, whose intermediate values are of [T, V].

    Args:
        model, attend_len: static; see `Transformer.__call__`.
        params: the model's parameters.
        cache: donated.
        counts: how often each token occurs in the output before this chunk.
        start: the chunk's position in the text.
        tokens: the chunk, right-padded with any valid id.
        following: the token after each.
        num_prompt: how many of the text's first tokens are the prompt.
        law: how the text was drawn.
        needs, drawable: static; see `steps.first_token`.

    Returns:
        The cache, and a row for each token.
    """
    cache, logits = logits_of_text(model, params, cache, start, tokens, attend_len=attend_len)
    logits = lax.optimization_barrier(logits)

    def draw(i: Array, carry: tuple[Array, CheckedDraws]) -> tuple[Array, CheckedDraws]:
        counts, checked = carry
        index = start + i + 1 - num_prompt
        counts = counts.at[tokens[i]].add((index > 0).astype(counts.dtype))
        drawn = sampling.sample(
            logits[i, None, :drawable],
            law.sampling,
            index[None],
            *(jnp.asarray(array)[None, :drawable] for array in (law.bias, law.in_prompt, counts)),
            noise=needs.noise,
            filters=needs.filters,
        )
        deficit = jnp.max(drawn.scores) - drawn.scores[0, following[i]]
        measures = measures_of(logits[i, None], following[i, None], drawn)
        row = CheckedDraws(drawn.tokens, measures, without_infinities(deficit[None]))
        return counts, jax.tree.map(lambda rows, new: rows.at[i].set(new[0]), checked, row)

    size = len(tokens)
    rows = CheckedDraws(
        jnp.zeros(size, jnp.int32), jnp.zeros((size, len(MEASURES))), jnp.zeros(size)
    )
    first = jnp.clip(num_prompt - 1 - start, 0, size)
    return cache, lax.fori_loop(first, size, draw, (counts, rows))[1]
