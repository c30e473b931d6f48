"""Whole texts, read at once, on a cache of their own: their logits, and draws that are checked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama_jax.decode import sampling
from llama_jax.decode.needs import Needs
from llama_jax.decode.sampling import AnyArray, SamplingParams
from llama_jax.decode.steps import measures_of, without_infinities
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
    size, vocab_size = logits.shape
    positions = start + jnp.arange(size, dtype=jnp.int32)
    is_new = (tokens[:, None] == jnp.arange(vocab_size)[None]) & (positions >= num_prompt)[:, None]
    so_far = counts[None] + jnp.cumsum(is_new.astype(jnp.int32), axis=0)
    rows = [jnp.broadcast_to(a[None], (size, vocab_size)) for a in (law.bias, law.in_prompt)]
    drawn = sampling.sample(
        logits[:, :drawable],
        jax.tree.map(lambda a: jnp.repeat(a, size, axis=0), law.sampling),
        jnp.maximum(positions + 1 - num_prompt, 0),
        *(array[:, :drawable] for array in (*rows, so_far)),
        noise=needs.noise,
        filters=needs.filters,
    )
    best = jnp.max(drawn.scores, axis=-1)
    own = jnp.take_along_axis(drawn.scores, following[:, None], axis=-1)[:, 0]
    measures = measures_of(logits, following, drawn)
    return cache, CheckedDraws(drawn.tokens, measures, without_infinities(best - own))
