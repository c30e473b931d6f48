"""Decode steps: slots admitted one by one, prompts prefilled in chunks, tokens in scans.

Everything is token ids and arrays. The functions are pure; `model_programs.py` describes the
programs that they are compiled to, with the state donated.

    admit(slot) -> prefill(slot, chunk) ... -> first_token(slot) -> decode(slots) ...
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from llama_jax.decode import sampling
from llama_jax.decode.loop import loop
from llama_jax.decode.needs import Needs
from llama_jax.decode.sampling import NO_TOKEN, NOT_FINITE, TOP_LOGPROBS, AnyArray, Sampled
from llama_jax.decode.state import DecodeState, gather_rows, scatter_rows
from llama_jax.decode.sums import log_softmax
from llama_jax.nn.transformer import Params, Transformer, forward


class Logprobs(NamedTuple):
    """Natural logarithms of the model's probabilities, before penalties and filters."""

    chosen: Float[Array, "*T n"]
    """Of the token itself."""
    top: Float[Array, "*T n top"]
    """Of the most likely tokens, in falling order."""
    top_ids: Int[Array, "*T n top"]


MEASURES = ("logprob", "margin", "top_k_margin", "top_p_margin", "min_p_margin")
"""What is recorded of each draw: `Logprobs.chosen`, `Sampled.margin` and `CutMargins`."""

_LARGEST = np.finfo(np.float32).max
"""For infinity in what a program returns, where `jax_debug_infs` admits none."""


class StepOutputs(NamedTuple):
    """What some steps generated, one column for each slot computed."""

    tokens: Int[Array, "*T n"]
    """Including the stop token; NO_TOKEN where a slot was done, NOT_FINITE where its request must
    end by an error."""
    measures: Float[Array, "*T n 5"]
    """MEASURES of the tokens, in one array, which is copied to the host at once; to be read by
    `with_infinities`."""
    logprobs: Logprobs | None
    """None where they are not needed."""


class ReadChunk(NamedTuple):
    """What one chunk of a prompt leaves for the output layer: the residual stream."""

    last: Float[Array, "1 D"]
    """At the prompt's last token in the chunk, for `first_token`."""
    hidden: Float[Array, "T D"]
    """At every token, padding included, for `score`."""


def prefill(
    model: Transformer,
    params: Params,
    state: DecodeState,
    slot: Int[Array, ""],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    *,
    attend_len: int,
) -> tuple[DecodeState, ReadChunk]:
    """Read one chunk of a slot's prompt.

    Args:
        model, attend_len: static; see `Transformer.__call__`.
        params: the model's parameters.
        state: donated.
        slot: the slot, admitted before.
        tokens: the chunk, right-padded with any valid id.
        length: how many of `tokens` are the prompt's, 1 to T.
    """
    part = gather_rows(state, slot[None])
    hidden, cache = model.bind({"params": params}).hidden(
        tokens[None, :],
        part.positions,
        state.cache,
        slots=slot[None],
        attend_len=attend_len,
    )
    chunk = hidden[0, : tokens.shape[0]]
    last = lax.dynamic_slice_in_dim(chunk, length - 1, 1)
    part = part._replace(cache=cache, positions=part.positions + length)
    return scatter_rows(state, part, slot[None]), ReadChunk(last, chunk)


def score(
    model: Transformer,
    params: Params,
    hidden: Float[Array, "T D"],
    targets: Int[Array, "T"],
) -> Logprobs:
    """Return the log-probabilities [T, 1] of the token after each of a chunk; see `ReadChunk`."""
    logits = model.bind({"params": params}).logits(hidden[None])
    return jax.tree.map(lambda a: a[:, None], _logprobs(logits[0], targets))


def first_token(
    model: Transformer,
    params: Params,
    state: DecodeState,
    slot: Int[Array, ""],
    last: Float[Array, "1 D"],
    *,
    needs: Needs,
    drawable: int | None = None,
) -> tuple[DecodeState, StepOutputs]:
    """Sample the first token of a slot whose prompt is read, and let the slot decode.

    Args:
        model: static.
        params: the model's parameters.
        state: donated.
        slot: the slot.
        last: of its prompt's last chunk; see `ReadChunk`.
        needs: static; what the slot's request needs, or more.
        drawable: static; only ids below it are sampled. None: all of the vocabulary.

    Returns:
        The state, and one step of one column.
    """
    logits = model.bind({"params": params}).logits(last[None])[0]
    part = gather_rows(state, slot[None])
    part = part._replace(done=jnp.zeros_like(part.done))
    part, outputs = emit(part, lax.optimization_barrier(logits), needs, drawable)
    return scatter_rows(state, part, slot[None]), jax.tree.map(lambda a: a[None], outputs)


def decode_step(
    model: Transformer,
    params: Params,
    state: DecodeState,
    *,
    needs: Needs,
    slots: Int[Array, "B"] | None = None,
    attend_len: int,
    drawable: int | None = None,
) -> tuple[DecodeState, StepOutputs]:
    """Feed every slot its last token and sample the next.

    A slot that is done is computed as well. It changes nothing of its own but a cache position
    that is not read before it is written again.
    """
    active = jnp.logical_not(state.done)
    logits, cache = forward(
        model,
        params,
        state.tokens[:, None],
        state.positions,
        state.cache,
        slots=slots,
        attend_len=attend_len,
    )
    positions = state.positions + active.astype(jnp.int32)
    state = state._replace(cache=cache, positions=positions)
    # The programs of other needs must find the same logits: nothing below is fused into the model.
    return emit(state, lax.optimization_barrier(logits[:, 0, :]), needs, drawable)


def decode(
    model: Transformer,
    params: Params,
    state: DecodeState,
    count: Int[Array, ""],
    slots: Int[Array, "n"] | None = None,
    *,
    needs: Needs,
    num_steps: int,
    varied: bool,
    attend_len: int,
    drawable: int | None = None,
) -> tuple[DecodeState, StepOutputs]:
    """Run steps without the host in between, whichever slots end.

    Args:
        model, num_steps, attend_len: static; attend_len is at least every active slot's position
            plus num_steps.
        params: the model's parameters.
        state: donated.
        count: steps to run, if they are varied; see `loop`.
        slots: the slots to compute, all different; None: all. See `Transformer.__call__`.
        needs: static; what the requests in these slots need, or more.
        varied: static; False: `num_steps` are run, as one scan.
        drawable: static; see `first_token`.

    Returns:
        The state, and the outputs of `num_steps` steps.
    """

    def step(part: DecodeState) -> tuple[DecodeState, StepOutputs]:
        return decode_step(
            model,
            params,
            part,
            needs=needs,
            slots=slots,
            attend_len=attend_len,
            drawable=drawable,
        )

    part = state if slots is None else gather_rows(state, slots)
    if varied:
        part, outputs = loop(step, part, count, num_steps)
    else:
        part, outputs = lax.scan(lambda part, _: step(part), part, None, length=num_steps)
    return part if slots is None else scatter_rows(state, part, slots), outputs


def emit(
    state: DecodeState,
    logits: Float[Array, "B V"],
    needs: Needs,
    drawable: int | None,
) -> tuple[DecodeState, StepOutputs]:
    """Sample a token for each slot that is not done; record it, and whether it ends the slot."""
    active = jnp.logical_not(state.done)
    # The law does not depend on the vocabulary's size, so it is applied to a part of it.
    candidates, bias, in_prompt, output_counts = (
        array[:, :drawable] for array in (logits, state.bias, state.in_prompt, state.output_counts)
    )
    # A slot that is done needs no noise and no filters.
    temperature = jnp.where(active, state.sampling.temperature, 0.0)
    params = state.sampling._replace(temperature=temperature)
    drawn = sampling.sample(
        candidates,
        params,
        state.steps,
        bias,
        in_prompt,
        output_counts,
        noise=needs.noise,
        filters=needs.filters,
    )
    is_finite = drawn.tokens != NOT_FINITE
    tokens = jnp.where(active & is_finite, drawn.tokens, state.tokens)
    steps = state.steps + active.astype(jnp.int32)
    stopped = jnp.any(tokens[:, None] == state.stop_tokens, axis=-1)
    ended = stopped | (steps >= state.limits) | jnp.logical_not(is_finite)
    rows = jnp.arange(tokens.shape[0])
    state = state._replace(
        tokens=tokens,
        steps=steps,
        done=state.done | (active & ended),
        output_counts=state.output_counts.at[rows, tokens].add(active.astype(jnp.int32)),
    )
    measures = measures_of(logits, tokens, drawn)
    logprobs = _logprobs(logits, tokens) if needs.logprobs else None
    return state, StepOutputs(jnp.where(active, drawn.tokens, NO_TOKEN), measures, logprobs)


def measures_of(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"], drawn: Sampled
) -> Float[Array, "B 5"]:
    """Return MEASURES of a token in each row, to be read by `with_infinities`."""
    measures = [_of(tokens, log_softmax(logits)), drawn.margin, *drawn.cuts]
    return without_infinities(jnp.stack(measures, axis=-1))


def without_infinities(values: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Return values with the largest float32 for infinity."""
    return jnp.minimum(values, _LARGEST)


def with_infinities(values: AnyArray) -> AnyArray:
    """Return a NumPy array with infinity again for the largest float32."""
    return np.where(values == _LARGEST, np.float32(np.inf), values)


def _of(tokens: Int[Array, "B"], values: Float[Array, "B V"]) -> Float[Array, "B"]:
    """Return each row's value of a token."""
    return jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]


def _logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Logprobs:
    logprobs = log_softmax(logits)
    top, top_ids = lax.top_k(logprobs, min(TOP_LOGPROBS, logprobs.shape[-1]))
    return Logprobs(_of(tokens, logprobs), top, top_ids)
