"""The decode contract: rows admitted one by one, prompts prefilled in chunks, tokens in scans.

Everything is token ids and arrays. A DecodeState has a fixed number of rows; each holds one
request at its own position, with its own sampling parameters. The functions are pure; `executor.py`
compiles them with the state donated.

    admit(row) -> prefill(row, chunk) ... prefill(row, last chunk: token 0) -> decode(rows) ...
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax import cache as kv
from llama_jax import sampling
from llama_jax.config import ModelConfig
from llama_jax.model import Llama, Params, forward
from llama_jax.sampling import AnyArray

NO_TOKEN = -1
"""Stands where a row that is done emits nothing, and for "no stop token"."""

TOP_LOGPROBS = 20
"""Of so many of the likeliest tokens the probability is told: what OpenAI's interface asks for."""


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities: of the logits before any filter."""

    chosen: Float[Array, "*T n"]
    """Of the token itself."""
    top: Float[Array, "*T n top"]
    """Of the likeliest tokens, falling."""
    top_ids: Int[Array, "*T n top"]


class Drawn(NamedTuple):
    """What some steps drew, one column per row that took part."""

    tokens: Int[Array, "*T n"]
    """The stop token among them; NO_TOKEN where a row was done."""
    logprobs: Logprobs
    """Zeros in a step in which no row asks for them."""


class DecodeState(NamedTuple):
    """All that decoding carries from step to step, one entry per row."""

    cache: kv.KVCache
    tokens: Int[Array, "B"]
    """The last token drawn; not in the cache yet."""
    positions: Int[Array, "B"]
    """The cache slot that comes next: that of `tokens`, or of the prompt's next chunk."""
    steps: Int[Array, "B"]
    """Tokens drawn so far: the index t of the next."""
    limits: Int[Array, "B"]
    """Tokens to draw at most (max_tokens)."""
    stop_tokens: Int[Array, "B"]
    """The token that ends the row (EOS), or NO_TOKEN."""
    done: Bool[Array, "B"]
    """The row draws nothing more: finished, idle, or still in prefill."""
    wants_logprobs: Bool[Array, "B"]
    sampling: sampling.SamplingParams
    in_prompt: Bool[Array, "B V"]
    """Tokens that occur in the prompt, for the repetition penalty."""
    output_counts: Int[Array, "B V"]
    """How often each token occurs in the output, for all three penalties."""


class Admission(NamedTuple):
    """What a row is given when a request takes it. Values, not shapes: none of it recompiles."""

    sampling: sampling.SamplingParams
    """Of shape [1]."""
    limit: Int[AnyArray, ""]
    """Tokens to draw at most, at least 1."""
    stop_token: Int[AnyArray, ""]
    """The token that ends the row, or NO_TOKEN."""
    wants_logprobs: Bool[AnyArray, ""]
    in_prompt: Bool[AnyArray, "V"]
    """The tokens that occur in the prompt."""
    start: Int[AnyArray, ""]
    """Tokens of the prompt that the row's cache holds already."""


def make_admission(
    params: sampling.SamplingParams,
    prompt: Sequence[int],
    vocab_size: int,
    *,
    limit: int,
    stop_token: int = NO_TOKEN,
    wants_logprobs: bool = False,
    start: int = 0,
) -> Admission:
    """Return the Admission (NumPy arrays) of a request of numbers."""
    in_prompt = np.zeros(vocab_size, bool)
    in_prompt[np.asarray(prompt, np.int32)] = True
    return Admission(
        sampling=params,
        limit=np.array(limit, np.int32),
        stop_token=np.array(stop_token, np.int32),
        wants_logprobs=np.array(wants_logprobs),
        in_prompt=in_prompt,
        start=np.array(start, np.int32),
    )


def init_state(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> DecodeState:
    """Return a state of `batch` idle rows with `capacity` cache slots each."""

    zeros = jnp.zeros((batch,), jnp.int32)
    return DecodeState(
        cache=kv.init_cache(config, batch, capacity, dtype),
        tokens=zeros,
        positions=zeros,
        steps=zeros,
        limits=zeros,
        stop_tokens=zeros,
        done=jnp.ones((batch,), bool),
        wants_logprobs=jnp.zeros((batch,), bool),
        sampling=jax.tree.map(lambda a: jnp.repeat(a, batch, axis=0), sampling.make_params()),
        in_prompt=jnp.zeros((batch, config.vocab_size), bool),
        output_counts=jnp.zeros((batch, config.vocab_size), jnp.int32),
    )


def admit(state: DecodeState, row: Int[Array, ""], new: Admission) -> DecodeState:
    """Give a row to a new request, whose prompt `prefill` is then to read; `state` is donated.

    Whatever the row held is forgotten, but for the first `new.start` slots of its cache.
    """
    return state._replace(
        positions=state.positions.at[row].set(new.start),
        steps=state.steps.at[row].set(0),
        limits=state.limits.at[row].set(new.limit),
        stop_tokens=state.stop_tokens.at[row].set(new.stop_token),
        done=state.done.at[row].set(True),
        wants_logprobs=state.wants_logprobs.at[row].set(new.wants_logprobs),
        sampling=jax.tree.map(lambda a, b: a.at[row].set(b[0]), state.sampling, new.sampling),
        in_prompt=state.in_prompt.at[row].set(new.in_prompt),
        output_counts=state.output_counts.at[row].set(0),
    )


def release(state: DecodeState, row: Int[Array, ""]) -> DecodeState:
    """End a row before its own end; `state` is donated."""
    return state._replace(done=state.done.at[row].set(True))


def copy_row(state: DecodeState, source: Int[Array, ""], target: Int[Array, ""]) -> DecodeState:
    """Copy the cache of one row to another; `state` is donated."""
    return state._replace(cache=kv.copy_row(state.cache, source, target))


def prefill(
    model: Llama,
    params: Params,
    state: DecodeState,
    row: Int[Array, ""],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    is_last: Bool[Array, ""],
    *,
    attend_len: int,
) -> tuple[DecodeState, Drawn]:
    """Read one chunk of a row's prompt; after the last, draw the row's first token.

    Args:
        model, attend_len: static; see `Llama.__call__`.
        params: the model's parameters.
        state: donated.
        row: the row, admitted before.
        tokens: the chunk, right-padded with any valid id.
        length: how many of `tokens` are the prompt's, 1 to T.
        is_last: whether the prompt ends with this chunk.

    Returns:
        The state, and one step of one column: the first token if `is_last`.
    """
    part = _take(state, row[None])
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
    model: Llama,
    params: Params,
    state: DecodeState,
    row: Int[Array, ""],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    is_last: Bool[Array, ""],
    targets: Int[Array, "T"],
    *,
    attend_len: int,
) -> tuple[DecodeState, Drawn, Logprobs]:
    """Read a chunk as `prefill`, and say how likely each token of the prompt was.

    Args:
        model, params, state, row, tokens, length, is_last, attend_len: as of `prefill`.
        targets: the token that follows each of `tokens`.

    Returns:
        As `prefill`, and the logprobs [T, 1] of `targets`.
    """
    part = _take(state, row[None])
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
    model: Llama,
    params: Params,
    state: DecodeState,
    *,
    rows: Int[Array, "B"] | None = None,
    attend_len: int,
) -> tuple[DecodeState, Drawn]:
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
    model: Llama,
    params: Params,
    state: DecodeState,
    rows: Int[Array, "n"] | None = None,
    *,
    num_steps: int,
    attend_len: int,
) -> tuple[DecodeState, Drawn]:
    """Run `num_steps` steps (static) as one scan: no host in between, whatever rows end.

    Args:
        model, num_steps, attend_len: static; attend_len is at least every active row's position
            plus num_steps.
        params: the model's parameters.
        state: donated.
        rows: the rows to compute, all different; None: all. See `Llama.__call__`.

    Returns:
        The state, and what each step drew.
    """

    def step(part: DecodeState, _: None) -> tuple[DecodeState, Drawn]:
        return decode_step(model, params, part, rows=rows, attend_len=attend_len)

    if rows is None:
        return lax.scan(step, state, None, length=num_steps)
    part, drawn = lax.scan(step, _take(state, rows), None, length=num_steps)
    return _put(state, part, rows), drawn


def score(
    model: Llama,
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


def _take(state: DecodeState, rows: Int[Array, "n"]) -> DecodeState:
    """Return some rows' entries, with the whole cache."""
    part = jax.tree.map(lambda a: a[rows], state._replace(cache=()))
    return part._replace(cache=state.cache)


def _put(state: DecodeState, part: DecodeState, rows: Int[Array, "n"]) -> DecodeState:
    """Put back what `_take` took."""
    entries, new = state._replace(cache=()), part._replace(cache=())
    entries = jax.tree.map(lambda a, b: a.at[rows].set(b, unique_indices=True), entries, new)
    return entries._replace(cache=part.cache)


def _finish_chunk(
    state: DecodeState,
    part: DecodeState,
    row: Int[Array, ""],
    logits: Float[Array, "1 V"],
    length: Int[Array, ""],
    is_last: Bool[Array, ""],
) -> tuple[DecodeState, Drawn]:
    """Move a row on past a chunk, and draw behind the last."""
    part = part._replace(positions=part.positions + length, done=jnp.logical_not(is_last)[None])
    part, drawn = _emit(part, logits, is_last[None])
    return _put(state, part, row[None]), jax.tree.map(lambda a: a[None], drawn)


def _emit(
    state: DecodeState, logits: Float[Array, "B V"], active: Bool[Array, "B"]
) -> tuple[DecodeState, Drawn]:
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
    return state, Drawn(jnp.where(active, tokens, NO_TOKEN), logprobs)


def _logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Logprobs:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, top_ids = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen, top, top_ids)


def _no_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Logprobs:
    batch, top = tokens.shape[0], min(TOP_LOGPROBS, logits.shape[-1])
    zeros = jnp.zeros((batch, top))
    return Logprobs(jnp.zeros((batch,)), zeros, zeros.astype(jnp.int32))
