"""Loop: steps run by one program, as many as an argument of it says."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.decode.state import DecodeState

T = TypeVar("T")


def loop(
    step: Callable[[DecodeState], tuple[DecodeState, T]],
    state: DecodeState,
    count: Int[Array, ""],
    most: int,
) -> tuple[DecodeState, T]:
    """Run `count` steps; fewer if every slot is done before.

    Args:
        step: one of them: returns the next state, and arrays.
        state: before the first.
        count: 0 to `most`. The program is the same for each, and so are the bits of a step.
        most: static.

    Returns:
        The last state, and the arrays of the steps with a first axis of `most`; NO_TOKEN where no
        step was run.
    """
    shapes = jax.eval_shape(step, state)[1]
    empty = jax.tree.map(lambda a: jnp.full((most, *a.shape), NO_TOKEN, a.dtype), shapes)

    def goes_on(carry: tuple[Array, DecodeState, T]) -> Array:
        place, state, _ = carry
        return (place < count) & jnp.logical_not(jnp.all(state.done))

    def run(carry: tuple[Array, DecodeState, T]) -> tuple[Array, DecodeState, T]:
        place, state, results = carry
        state, new = step(state)

        def put(all_steps: Any, own: Any) -> Array:
            return lax.dynamic_update_index_in_dim(all_steps, own, place, 0)

        return place + 1, state, jax.tree.map(put, results, new)

    first = jnp.zeros((), jnp.int32)
    _, state, results = lax.while_loop(goes_on, run, (first, state, empty))
    return state, results
