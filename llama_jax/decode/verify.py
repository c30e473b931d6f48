"""Verify: drafts of the next tokens, held against what the law draws, in one pass of the model.

A draft is accepted where it equals the token that the law draws there, so the tokens are those of
`decode`, whatever was drafted. A window holds the last token of a slot and its drafts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama_jax.decode.needs import Needs
from llama_jax.decode.sampling import DIRTY, NO_TOKEN, NOT_FINITE, TOP_LOGPROBS
from llama_jax.decode.state import DecodeState, gather_rows, scatter_rows
from llama_jax.decode.steps import MEASURES, Logprobs, StepOutputs, emit
from llama_jax.nn.transformer import Params, Transformer, forward


class _Progress(NamedTuple):
    """How far a window is."""

    place: Int[Array, ""]
    state: DecodeState
    """Without the cache; a slot is done where its window has ended."""
    ended: Bool[Array, "n"]
    """The slot's request has ended."""
    outputs: StepOutputs


def verify(
    model: Transformer,
    params: Params,
    state: DecodeState,
    drafts: Int[Array, "n K"],
    slots: Int[Array, "n"] | None = None,
    *,
    needs: Needs,
    attend_len: int,
    drawable: int | None = None,
) -> tuple[DecodeState, StepOutputs]:
    """Draw the next tokens of some slots: one, and one more after each draft that equals it.

    The cache gets keys and values of all drafts. Those after the last accepted one lie at the
    slot's next positions or beyond, where nothing reads them before they are written again.

    Args:
        model, attend_len: static; see `Transformer.__call__`. attend_len is at least every active
            slot's position plus K + 1.
        params: the model's parameters.
        state: donated.
        drafts: of each slot computed; NO_TOKEN where there is none, and at all places after it.
        slots, needs, drawable: see `steps.decode`.

    Returns:
        The state, and the outputs of K + 1 steps: NO_TOKEN after the first that no draft equals.
        DIRTY in its place: numbers of a draft are not finite. If no token precedes it, the slot is
        as before.
    """
    part = state if slots is None else gather_rows(state, slots)
    last = part.tokens[:, None]
    window = jnp.concatenate([last, jnp.where(drafts == NO_TOKEN, last, drafts)], axis=1)
    model = model.clone(kernels=model.kernels.of_window())
    logits, cache = forward(
        model, params, window, part.positions, state.cache, slots=slots, attend_len=attend_len
    )
    # The CPU kernels read no position beyond a query's. Others give it the weight 0, and 0 times
    # NaN is NaN. And a GPU's host would wait at every place for the answer whether to go on.
    early = model.kernels.projection == "native"
    drawn, outputs = _draw(
        part._replace(cache=()), lax.optimization_barrier(logits), drafts, needs, drawable, early
    )
    drawn = drawn._replace(cache=cache)
    if not early:
        is_finite = jnp.all(jnp.isfinite(logits), axis=-1).T
        is_dirty = (outputs.tokens == NO_TOKEN) & ~is_finite & ~part.done[None, :]
        outputs = outputs._replace(tokens=jnp.where(is_dirty, DIRTY, outputs.tokens))
    return (drawn if slots is None else scatter_rows(state, drawn, slots)), outputs


def _draw(
    part: DecodeState,
    logits: Float[Array, "n T V"],
    drafts: Int[Array, "n K"],
    needs: Needs,
    drawable: int | None,
    early: bool,
) -> tuple[DecodeState, StepOutputs]:
    """Draw at each place of a window as a decode step does; `early`: until no slot's goes on."""
    following = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    width = logits.shape[1]

    def goes_on(progress: _Progress) -> Bool[Array, ""]:
        is_inside = progress.place < width
        return is_inside & ~jnp.all(progress.state.done) if early else is_inside

    def draw(progress: _Progress) -> _Progress:
        i, before = progress.place, progress.state
        after, new = emit(before, logits[:, i], needs, drawable)
        active = jnp.logical_not(before.done)
        after = after._replace(positions=before.positions + active.astype(jnp.int32))
        if not early:
            # A draft may have spoiled it: the slot is to be computed again, without drafts.
            spoiled = (new.tokens == NOT_FINITE) & (drafts[:, 0] != NO_TOKEN)
            after = _unless(spoiled, after, before)
            new = new._replace(tokens=jnp.where(spoiled, DIRTY, new.tokens))
        ended = progress.ended | (active & after.done)
        rejected = active & ((following[:, i] != after.tokens) | (new.tokens == DIRTY))
        outputs = jax.tree.map(lambda rows, row: rows.at[i].set(row), progress.outputs, new)
        return _Progress(i + 1, after._replace(done=after.done | rejected), ended, outputs)

    outputs = _no_outputs(width, logits, needs)
    end = lax.while_loop(goes_on, draw, _Progress(jnp.int32(0), part, part.done, outputs))
    return end.state._replace(done=end.ended), end.outputs


def _unless(condition: Bool[Array, "n"], new: DecodeState, old: DecodeState) -> DecodeState:
    """Return a state whose slots are advanced, but for those of a condition."""
    return new._replace(
        steps=jnp.where(condition, old.steps, new.steps),
        positions=jnp.where(condition, old.positions, new.positions),
        done=jnp.where(condition, old.done, new.done),
        output_counts=jnp.where(condition[:, None], old.output_counts, new.output_counts),
    )


def _no_outputs(width: int, logits: Float[Array, "n T V"], needs: Needs) -> StepOutputs:
    """Return the outputs of steps in which nothing is drawn."""
    slots, vocab_size = logits.shape[0], logits.shape[-1]
    tokens = jnp.full((width, slots), NO_TOKEN, jnp.int32)
    measures = jnp.zeros((width, slots, len(MEASURES)))
    if not needs.logprobs:
        return StepOutputs(tokens, measures, None)
    top = jnp.zeros((width, slots, min(TOP_LOGPROBS, vocab_size)))
    logprobs = Logprobs(jnp.zeros((width, slots)), top, jnp.zeros(top.shape, jnp.int32))
    return StepOutputs(tokens, measures, logprobs)
