"""The decode contract: rows admitted one by one, prompts prefilled in chunks, tokens in scans.

Everything is token ids and arrays. A DecodeState has a fixed number of rows; each holds one
request at its own position, with its own sampling parameters. The functions are pure; `executor.py`
compiles them with the state donated.

    admit(row) -> prefill(row, chunk) ... prefill(row, last chunk: token 0) -> decode(all rows) ...
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax import cache as kv
from llama_jax import sampling
from llama_jax.config import ModelConfig
from llama_jax.model import Llama, Params, forward

NO_TOKEN = -1
"""Stands where a row that is done emits nothing, and for "no stop token"."""


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
    sampling: sampling.SamplingParams
    in_prompt: Bool[Array, "B V"]
    """Tokens that occur in the prompt, for the repetition penalty."""
    output_counts: Int[Array, "B V"]
    """How often each token occurs in the output, for all three penalties."""


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
        sampling=jax.tree.map(lambda a: jnp.repeat(a, batch, axis=0), sampling.make_params()),
        in_prompt=jnp.zeros((batch, config.vocab_size), bool),
        output_counts=jnp.zeros((batch, config.vocab_size), jnp.int32),
    )


def admit(
    state: DecodeState,
    row: Int[Array, ""],
    params: sampling.SamplingParams,
    limit: Int[Array, ""],
    stop_token: Int[Array, ""],
) -> DecodeState:
    """Give a row to a new request, whose prompt `prefill` is then to read.

    Args:
        state: donated.
        row: its index; whatever the row held is forgotten.
        params: the request's, of shape [1].
        limit: tokens to draw at most, at least 1.
        stop_token: the token that ends it, or NO_TOKEN.
    """
    vocab_size = state.in_prompt.shape[1]
    return state._replace(
        positions=state.positions.at[row].set(0),
        steps=state.steps.at[row].set(0),
        limits=state.limits.at[row].set(limit),
        stop_tokens=state.stop_tokens.at[row].set(stop_token),
        done=state.done.at[row].set(True),
        sampling=jax.tree.map(lambda a, new: a.at[row].set(new[0]), state.sampling, params),
        in_prompt=state.in_prompt.at[row].set(jnp.zeros((vocab_size,), bool)),
        output_counts=state.output_counts.at[row].set(jnp.zeros((vocab_size,), jnp.int32)),
    )


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
) -> tuple[DecodeState, Int[Array, "1 B"]]:
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
        The state, and the tokens drawn, as of one step: NO_TOKEN but for `row` at `is_last`.
    """
    batch = state.done.shape[0]
    start = state.positions[row]
    logits, cache = forward(
        model,
        params,
        tokens[None, :],
        start[None],
        state.cache,
        row=row,
        attend_len=attend_len,
        last=length[None] - 1,
    )
    is_prompt = jnp.arange(tokens.shape[0]) < length
    outside = state.in_prompt.shape[1]  # an index to drop
    used = jnp.where(is_prompt, tokens, outside)
    this_row = jnp.arange(batch) == row
    state = state._replace(
        cache=cache,
        positions=state.positions.at[row].set(start + length),
        done=state.done.at[row].set(jnp.logical_not(is_last)),
        in_prompt=state.in_prompt.at[row, used].set(True, mode="drop"),
    )
    rows_logits = jnp.where(this_row[:, None], logits[:, 0, :], 0.0)
    state, drawn = _emit(state, rows_logits, this_row & is_last)
    return state, drawn[None, :]


def decode_step(
    model: Llama, params: Params, state: DecodeState, *, attend_len: int
) -> tuple[DecodeState, Int[Array, "B"]]:
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
        attend_len=attend_len,
    )
    positions = state.positions + active.astype(jnp.int32)
    state = state._replace(cache=cache, positions=positions)
    return _emit(state, logits[:, 0, :], active)


def decode(
    model: Llama, params: Params, state: DecodeState, *, num_steps: int, attend_len: int
) -> tuple[DecodeState, Int[Array, "num_steps B"]]:
    """Run `num_steps` steps (static) as one scan: no host in between, whatever rows end.

    Args:
        model, num_steps, attend_len: static; attend_len is at least every active row's position
            plus num_steps.
        params: the model's parameters.
        state: donated.

    Returns:
        The state, and each step's tokens, the stop token among them; NO_TOKEN for rows done.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        return decode_step(model, params, state, attend_len=attend_len)

    return lax.scan(step, state, None, length=num_steps)


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


def _emit(
    state: DecodeState, logits: Float[Array, "B V"], active: Bool[Array, "B"]
) -> tuple[DecodeState, Int[Array, "B"]]:
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
    return state, jnp.where(active, tokens, NO_TOKEN)
