"""The decode state: a fixed number of slots, each with one request at its own position.

`admit` gives a slot to a request; the functions of `steps.py` advance it. All are pure;
`state_programs.py` describes the programs that they are compiled to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling
from llama_jax.decode.sampling import NO_TOKEN, AnyArray
from llama_jax.nn import cache as kv


class DecodeState(NamedTuple):
    """All that decoding carries from step to step, one entry for each slot."""

    cache: kv.KVCache
    tokens: Int[Array, "B"]
    """The last token generated; not in the cache yet."""
    positions: Int[Array, "B"]
    """The next cache position: that of `tokens`, or of the prompt's next chunk."""
    steps: Int[Array, "B"]
    """Tokens generated so far: the index t of the next."""
    limits: Int[Array, "B"]
    """Tokens to generate at most (max_tokens)."""
    stop_tokens: Int[Array, "B E"]
    """The tokens that end the slot's request, as many as the model has; NO_TOKEN: none."""
    done: Bool[Array, "B"]
    """The slot generates nothing: its request ended, it is idle, or still in prefill."""
    sampling: sampling.SamplingParams
    bias: Float[Array, "B V"]
    """Added to the logits; -inf for a token that must not be drawn."""
    in_prompt: Bool[Array, "B V"]
    """Whether each token occurs in the prompt, for the repetition penalty."""
    output_counts: Int[Array, "B V"]
    """How often each token occurs in the output, for all three penalties."""


class Admission(NamedTuple):
    """What a slot is given with a request. Values, not shapes: none of it recompiles."""

    sampling: sampling.SamplingParams
    """Of shape [1]."""
    limit: Int[AnyArray, ""]
    """Tokens to generate at most, 1 or more."""
    stop_tokens: Int[AnyArray, "E"]
    """The tokens that end the request, as many as the model has; NO_TOKEN: none."""
    bias: Float[AnyArray, "V"]
    """As from `sampling.make_bias`."""
    in_prompt: Bool[AnyArray, "V"]
    """Whether each token occurs in the prompt."""
    output_counts: Int[AnyArray, "V"]
    """How often each token occurs in the output so far, which is read with the prompt."""
    start: Int[AnyArray, ""]
    """Tokens of prompt and output so far that the slot's cache holds already."""


def make_admission(
    params: sampling.SamplingParams,
    prompt: Sequence[int],
    vocab_size: int,
    *,
    limit: int,
    stop_tokens: Sequence[int] = (NO_TOKEN,),
    bias: np.ndarray | None = None,
    output: Sequence[int] = (),
    start: int = 0,
) -> Admission:
    """Return an Admission of NumPy arrays."""
    in_prompt = np.zeros(vocab_size, bool)
    in_prompt[np.asarray(prompt, np.int32)] = True
    output_counts = np.bincount(np.asarray(output, np.int32), minlength=vocab_size)
    return Admission(
        sampling=params,
        limit=np.array(limit, np.int32),
        stop_tokens=np.array(stop_tokens, np.int32),
        bias=sampling.make_bias(vocab_size) if bias is None else bias,
        in_prompt=in_prompt,
        output_counts=output_counts.astype(np.int32),
        start=np.array(start, np.int32),
    )


def init_state(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> DecodeState:
    """Return a state of `batch` idle slots with `capacity` cache positions each."""
    zeros = jnp.zeros((batch,), jnp.int32)
    return DecodeState(
        cache=kv.init_cache(config, batch, capacity, dtype),
        tokens=zeros,
        positions=zeros,
        steps=zeros,
        limits=zeros,
        stop_tokens=jnp.zeros((batch, len(config.eos_tokens)), jnp.int32),
        done=jnp.ones((batch,), bool),
        sampling=jax.tree.map(lambda a: jnp.repeat(a, batch, axis=0), sampling.make_params()),
        bias=jnp.zeros((batch, config.vocab_size), jnp.float32),
        in_prompt=jnp.zeros((batch, config.vocab_size), bool),
        output_counts=jnp.zeros((batch, config.vocab_size), jnp.int32),
    )


def admit(state: DecodeState, slot: Int[Array, ""], new: Admission) -> DecodeState:
    """Give a slot to a new request, whose prompt `prefill` then reads; `state` is donated.

    All that the slot held is discarded, except the first `new.start` positions of its cache.
    """
    return state._replace(
        positions=state.positions.at[slot].set(new.start),
        steps=state.steps.at[slot].set(jnp.sum(new.output_counts)),
        limits=state.limits.at[slot].set(new.limit),
        stop_tokens=state.stop_tokens.at[slot].set(new.stop_tokens),
        done=state.done.at[slot].set(True),
        sampling=jax.tree.map(lambda a, b: a.at[slot].set(b[0]), state.sampling, new.sampling),
        bias=state.bias.at[slot].set(new.bias),
        in_prompt=state.in_prompt.at[slot].set(new.in_prompt),
        output_counts=state.output_counts.at[slot].set(new.output_counts),
    )


def release(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """End a slot's request early; `state` is donated."""
    return state._replace(done=state.done.at[slot].set(True))


def copy_slot(state: DecodeState, source: Int[Array, ""], target: Int[Array, ""]) -> DecodeState:
    """Copy the cache of one slot to another; `state` is donated."""
    return state._replace(cache=kv.copy_slot(state.cache, source, target))


def clear_slot(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Set the cache of one slot to zero; `state` is donated.

    Positions that are not read have no weight in attention, but NaN times zero is NaN.
    """
    return state._replace(cache=kv.clear_slot(state.cache, slot))


def gather_rows(state: DecodeState, slots: Int[Array, "n"]) -> DecodeState:
    """Return some slots' entries, with the whole cache."""
    part = jax.tree.map(lambda a: a[slots], state._replace(cache=()))
    return part._replace(cache=state.cache)


def scatter_rows(state: DecodeState, part: DecodeState, slots: Int[Array, "n"]) -> DecodeState:
    """Write back what `gather_rows` returned, after it was advanced."""
    entries, new = state._replace(cache=()), part._replace(cache=())
    entries = jax.tree.map(lambda a, b: a.at[slots].set(b, unique_indices=True), entries, new)
    return entries._replace(cache=part.cache)
