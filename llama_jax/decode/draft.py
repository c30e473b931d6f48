"""Draft: the tokens that a small model draws next, for `verify` to hold against the large one's.

It draws by the same law with the same noise: where two models are nearly sure of the same tokens,
they draw the same ones far more often than if the small one took its likeliest.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from llama_jax.decode.needs import Needs
from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.decode.state import DecodeState, gather_rows, scatter_rows
from llama_jax.decode.steps import decode_step, emit
from llama_jax.nn.transformer import Params, Transformer, forward

LAST = 2
"""Tokens of the text that are read before the first draft: of a window that was accepted whole,
the last draft and the token after it are not in the cache."""

_NO_LIMIT = 2**30


def draft(
    model: Transformer,
    params: Params,
    state: DecodeState,
    last: Int[Array, "n 2"],
    starts: Int[Array, "n"],
    steps: Int[Array, "n"],
    accepted: Int[Array, "n A"],
    slots: Int[Array, "n"] | None = None,
    *,
    num_drafts: int,
    needs: Needs,
    attend_len: int,
    drawable: int | None = None,
) -> tuple[DecodeState, Int[Array, "K n"]]:
    """Draw the next tokens of some slots, whose cache has the text up to the last two tokens.

    Args:
        model, num_drafts, attend_len: static; attend_len is at least every start plus 1 + K.
        params: the model's parameters.
        state: donated. What it has of tokens, positions and steps is not read.
        last: the last two tokens of each text.
        starts: the position of the first of them.
        steps: tokens of the output so far.
        accepted: those of them that the state has not counted yet, and NO_TOKEN after them.
        slots, needs, drawable: see `steps.decode`.

    Returns:
        The state, which has counted what was accepted and not the drafts, and the drafts.
    """
    part = state if slots is None else gather_rows(state, slots)
    rows = jnp.arange(last.shape[0])[:, None]
    is_token = (accepted != NO_TOKEN).astype(jnp.int32)
    counts = part.output_counts.at[rows, jnp.maximum(accepted, 0)].add(is_token)
    window_model = model.clone(kernels=model.kernels.of_window())
    logits, cache = forward(
        window_model, params, last, starts, state.cache, slots=slots, attend_len=attend_len
    )
    ahead = part._replace(
        cache=cache,
        positions=starts + LAST,
        steps=steps,
        limits=jnp.full_like(part.limits, _NO_LIMIT),
        stop_tokens=jnp.full_like(part.stop_tokens, NO_TOKEN),
        done=jnp.zeros_like(part.done),
        output_counts=counts,
    )
    ahead, first = emit(ahead, logits[:, -1], needs, drawable)

    def step(ahead: DecodeState, _: None) -> tuple[DecodeState, Array]:
        ahead, outputs = decode_step(
            model,
            params,
            ahead,
            needs=needs,
            slots=slots,
            attend_len=attend_len,
            drawable=drawable,
        )
        return ahead, outputs.tokens

    ahead, others = lax.scan(step, ahead, None, length=num_drafts - 1)
    part = part._replace(cache=ahead.cache, output_counts=counts)
    drafts = jnp.concatenate([first.tokens[None], others])
    return (part if slots is None else scatter_rows(state, part, slots)), drafts
