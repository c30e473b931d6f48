"""The decode contract: rows admitted one by one, prompts prefilled in chunks, tokens in scans.

Everything is token ids and arrays. The functions are pure; `executor.py` compiles them with the
state donated.

    admit(row) -> prefill(row, chunk) ... prefill(row, last chunk: token 0) -> decode(rows) ...
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama_jax.decode import sampling
from llama_jax.decode.sampling import NO_TOKEN, TOP_LOGPROBS
from llama_jax.decode.state import DecodeState, gather_rows, scatter_rows
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Params, Transformer, forward


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities: of the logits before any filter."""

    chosen: Float[Array, "*T n"]
    """Of the token itself."""
    top: Float[Array, "*T n top"]
    """Of the likeliest tokens, falling."""
    top_ids: Int[Array, "*T n top"]


class StepOutputs(NamedTuple):
    """What some steps drew, one column per row that took part."""

    tokens: Int[Array, "*T n"]
    """The stop token among them; NO_TOKEN where a row was done."""
    logprobs: Logprobs
    """Zeros in a step in which no row asks for them."""


def prefill(
    model: Transformer,
    params: Params,
    state: DecodeState,
    row: Int[Array, ""],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    is_last: Bool[Array, ""],
    *,
    attend_len: int,
) -> tuple[DecodeState, StepOutputs]:
    """Read one chunk of a row's prompt; after the last, draw the row's first token.

    Args:
        model, attend_len: static; see `Transformer.__call__`.
        params: the model's parameters.
        state: donated.
        row: the row, admitted before.
        tokens: the chunk, right-padded with any valid id.
        length: how many of `tokens` are the prompt's, 1 to T.
        is_last: whether the prompt ends with this chunk.

    Returns:
        The state, and one step of one column: the first token if `is_last`.
    """
    part = gather_rows(state, row[None])
    logits, cache = forward(
        model,
        params,
        tokens[None, :],
        part.positions,
        state.cache,
        rows=row[None],
        attend_len=attend_len,
        last=length[None] - 1,
    )
    return _finish_chunk(state, part._replace(cache=cache), row, logits[:, 0, :], length, is_last)


def prefill_scored(
    model: Transformer,
    params: Params,
    state: DecodeState,
    row: Int[Array, ""],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    is_last: Bool[Array, ""],
    targets: Int[Array, "T"],
    *,
    attend_len: int,
) -> tuple[DecodeState, StepOutputs, Logprobs]:
    """Read a chunk as `prefill`, and say how likely each token of the prompt was.

    Args:
        model, params, state, row, tokens, length, is_last, attend_len: as of `prefill`.
        targets: the token that follows each of `tokens`.

    Returns:
        As `prefill`, and the logprobs [T, 1] of `targets`.
    """
    part = gather_rows(state, row[None])
    logits, cache = forward(
        model,
        params,
        tokens[None, :],
        part.positions,
        state.cache,
        rows=row[None],
        attend_len=attend_len,
    )
    last = lax.dynamic_slice_in_dim(logits[0], length - 1, 1)
    state, drawn = _finish_chunk(state, part._replace(cache=cache), row, last, length, is_last)
    scored = _logprobs(logits[0], targets)
    return state, drawn, jax.tree.map(lambda a: a[:, None], scored)


def decode_step(
    model: Transformer,
    params: Params,
    state: DecodeState,
    *,
    rows: Int[Array, "B"] | None = None,
    attend_len: int,
) -> tuple[DecodeState, StepOutputs]:
    """Feed every row its last token and draw the next.

    A row that is done computes along and changes nothing of its own but a slot of its cache that
    is not read before it is written again.
    """
    active = jnp.logical_not(state.done)
    logits, cache = forward(
        model,
        params,
        state.tokens[:, None],
        state.positions,
        state.cache,
        rows=rows,
        attend_len=attend_len,
    )
    positions = state.positions + active.astype(jnp.int32)
    state = state._replace(cache=cache, positions=positions)
    return _emit(state, logits[:, 0, :], active)


def decode(
    model: Transformer,
    params: Params,
    state: DecodeState,
    rows: Int[Array, "n"] | None = None,
    *,
    num_steps: int,
    attend_len: int,
) -> tuple[DecodeState, StepOutputs]:
    """Run `num_steps` steps (static) as one scan: no host in between, whatever rows end.

    Args:
        model, num_steps, attend_len: static; attend_len is at least every active row's position
            plus num_steps.
        params: the model's parameters.
        state: donated.
        rows: the rows to compute, all different; None: all. See `Transformer.__call__`.

    Returns:
        The state, and what each step drew.
    """

    def step(part: DecodeState, _: None) -> tuple[DecodeState, StepOutputs]:
        return decode_step(model, params, part, rows=rows, attend_len=attend_len)

    if rows is None:
        return lax.scan(step, state, None, length=num_steps)
    part, drawn = lax.scan(step, gather_rows(state, rows), None, length=num_steps)
    return scatter_rows(state, part, rows), drawn


def score(
    model: Transformer,
    params: Params,
    cache: kv.KVCache,
    start: Int[Array, ""],
    tokens: Int[Array, "T"],
    *,
    attend_len: int,
) -> tuple[kv.KVCache, Float[Array, "T V"]]:
    """Return the logits at every position of one chunk of a lone row; the cache is donated."""
    logits, cache = forward(
        model, params, tokens[None, :], start[None], cache, attend_len=attend_len
    )
    return cache, logits[0]


def _finish_chunk(
    state: DecodeState,
    part: DecodeState,
    row: Int[Array, ""],
    logits: Float[Array, "1 V"],
    length: Int[Array, ""],
    is_last: Bool[Array, ""],
) -> tuple[DecodeState, StepOutputs]:
    """Move a row on past a chunk, and draw behind the last."""
    part = part._replace(positions=part.positions + length, done=jnp.logical_not(is_last)[None])
    part, drawn = _emit(part, logits, is_last[None])
    return scatter_rows(state, part, row[None]), jax.tree.map(lambda a: a[None], drawn)


def _emit(
    state: DecodeState, logits: Float[Array, "B V"], active: Bool[Array, "B"]
) -> tuple[DecodeState, StepOutputs]:
    """Draw a token for each active row; note it, and whether it ends the row."""
    drawn = sampling.sample(
        logits, state.sampling, state.steps, state.in_prompt, state.output_counts
    )
    tokens = jnp.where(active, drawn, state.tokens)
    steps = state.steps + active.astype(jnp.int32)
    ended = (tokens == state.stop_tokens) | (steps >= state.limits)
    rows = jnp.arange(tokens.shape[0])
    state = state._replace(
        tokens=tokens,
        steps=steps,
        done=state.done | (active & ended),
        output_counts=state.output_counts.at[rows, tokens].add(active.astype(jnp.int32)),
    )
    logprobs = lax.cond(
        jnp.any(active & state.wants_logprobs), _logprobs, _no_logprobs, logits, tokens
    )
    return state, StepOutputs(jnp.where(active, tokens, NO_TOKEN), logprobs)


def _logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Logprobs:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, top_ids = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen, top, top_ids)


def _no_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Logprobs:
    batch, top = tokens.shape[0], min(TOP_LOGPROBS, logits.shape[-1])
    zeros = jnp.zeros((batch, top))
    return Logprobs(jnp.zeros((batch,)), zeros, zeros.astype(jnp.int32))
