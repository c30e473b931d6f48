"""The state of decoding: a fixed number of rows, each with one request at its own position.

A row is given to a request by `admit`; `decode.py` then moves it on. The functions are pure;
`executor.py` compiles them with the state donated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling
from llama_jax.decode.sampling import NO_TOKEN, AnyArray
from llama_jax.nn import cache as kv


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


def gather_rows(state: DecodeState, rows: Int[Array, "n"]) -> DecodeState:
    """Return some rows' entries, with the whole cache."""
    part = jax.tree.map(lambda a: a[rows], state._replace(cache=()))
    return part._replace(cache=state.cache)


def scatter_rows(state: DecodeState, part: DecodeState, rows: Int[Array, "n"]) -> DecodeState:
    """Put back what `take` took."""
    entries, new = state._replace(cache=()), part._replace(cache=())
    entries = jax.tree.map(lambda a, b: a.at[rows].set(b, unique_indices=True), entries, new)
    return entries._replace(cache=part.cache)
