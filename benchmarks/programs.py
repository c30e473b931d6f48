"""How an Executor's programs are run when they are timed, with nothing around them."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.decode import sampling
from llama_jax.decode.executor import Executor
from llama_jax.decode.state import Admission, DecodeState, make_admission


def greedy(run: Executor, prompt: list[int], new_tokens: int) -> Admission:
    """Return what a row is given to draw `new_tokens` of the likeliest tokens."""
    params = sampling.make_params(temperature=0.0)
    return make_admission(params, prompt, run.config.vocab_size, limit=new_tokens)


def read_prompt(run: Executor, state: DecodeState, prompt: list[int]) -> DecodeState:
    """Prefill a prompt into row 0 and bring its first token to the host; consumes `state`."""
    state = run.admit(state, 0, greedy(run, prompt, 1))
    state, first = run.prefill(state, 0, prompt)
    np.asarray(first.tokens)
    return state


def set_rows(run: Executor, state: DecodeState, context: int, new_tokens: int) -> DecodeState:
    """Let every row hold `context` tokens and draw `new_tokens`; consumes `state`.

    Without a prompt: speed does not depend on the cache's values.
    """
    for row in range(run.batch):
        state = run.admit(state, row, greedy(run, [0], new_tokens))
    state = state._replace(
        positions=jnp.full((run.batch,), context, jnp.int32), done=jnp.zeros((run.batch,), bool)
    )
    return jax.block_until_ready(state)


def draw_tokens(
    run: Executor, state: DecodeState, context: int, new_tokens: int, dispatches: int
) -> DecodeState:
    """Decode as the engine does: while one chunk is read, others may run; consumes `state`."""
    pending = []
    for position in range(context, context + new_tokens, run.plan.decode_steps):
        state, drawn, _ = run.decode(state, range(run.batch), position)
        pending.append(drawn.tokens)
        if len(pending) == dispatches:
            np.asarray(pending.pop(0))
    for tokens in pending:
        np.asarray(tokens)
    return state
