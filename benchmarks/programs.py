"""All that touches an Executor's programs: how they are run when they are timed, bare."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling
from llama_jax.decode.executor import Executor
from llama_jax.decode.needs import Needs
from llama_jax.decode.plan import Plan
from llama_jax.decode.state import Admission, DecodeState, init_state, make_admission
from llama_jax.decode.steps import decode
from llama_jax.llama import Llama
from llama_jax.nn.transformer import Transformer, param_shapes

_GREEDY = Needs()


def _greedy(run: Executor, prompt: list[int], new_tokens: int) -> Admission:
    """Return what a slot is given to draw `new_tokens` of the likeliest tokens."""
    params = sampling.make_params(temperature=0.0)
    return make_admission(params, prompt, run.config.vocab_size, limit=new_tokens)


def time_prefill(
    run: Executor, state: DecodeState | None, prompt: list[int]
) -> tuple[DecodeState, float]:
    """Prefill a prompt into slot 0; return the state and the seconds to its first token."""
    state = run.init_state() if state is None else state
    jax.block_until_ready(state)
    began = time.perf_counter()
    state = run.admit(state, 0, _greedy(run, prompt, 1))
    state, first = run.prefill(state, 0, prompt, needs=_GREEDY)
    np.asarray(first.tokens)
    return state, time.perf_counter() - began


def time_chunk(run: Executor, state: DecodeState | None, size: int) -> tuple[DecodeState, float]:
    """Read one chunk of a prompt into slot 0; return the state and the seconds."""
    state = run.init_state() if state is None else state
    prompt = [3 + i for i in range(size)]
    state = run.admit(state, 0, _greedy(run, prompt, 1))
    jax.block_until_ready(state)
    began = time.perf_counter()
    state, chunk = run.prefill_chunk(state, 0, prompt, 0, size)
    jax.block_until_ready(chunk)
    return state, time.perf_counter() - began


def time_decode(
    run: Executor,
    state: DecodeState | None,
    context: int,
    new_tokens: int,
    slots: int | None = None,
) -> tuple[DecodeState, float]:
    """Decode some slots, by default all, as the engine does; return the state and the seconds.

    Every slot holds `context` tokens before, without a prompt: speed does not depend on the
    cache's values. All tokens are read by the host, while the plan's dispatches are in flight.
    """
    state = run.init_state() if state is None else state
    for slot in range(run.batch):
        state = run.admit(state, slot, _greedy(run, [0], new_tokens))
    slots = run.batch if slots is None else slots
    positions = jnp.full((run.batch,), context, jnp.int32)
    state = state._replace(positions=positions, done=jnp.arange(run.batch) >= slots)
    jax.block_until_ready(state)
    began = time.perf_counter()
    in_flight = []
    for position in range(context, context + new_tokens, run.plan.decode_steps):
        state, outputs, _ = run.decode(state, range(slots), position, _GREEDY)
        in_flight.append(outputs.tokens)
        if len(in_flight) == run.plan.max_in_flight:
            np.asarray(in_flight.pop(0))
    for tokens in in_flight:
        np.asarray(tokens)
    return state, time.perf_counter() - began


def run_batch(llama: Llama, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Answer all prompts, as many at once as there are slots; return seconds and tokens."""
    for _ in llama.engine.warm_up():
        pass
    # Untimed first, to touch the memory of every slot: prompts that begin otherwise.
    backwards = [(tokens[::-1], new_tokens) for tokens in prompts[: llama.executor.batch]]
    answer_all(llama, backwards)
    llama.executor.compile_wanted()
    began = time.perf_counter()
    tokens = answer_all(llama, [(tokens, new_tokens) for tokens in prompts])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}


def answer_all(llama: Llama, requests: list[tuple[list[int], int]]) -> int:
    """Answer requests of a prompt and a number of tokens; return the tokens generated."""
    wanted = {"temperature": 0, "ignore_eos": True}
    calls = ({"prompt_tokens": ids, "max_tokens": number, **wanted} for ids, number in requests)
    return sum(len(result.tokens) for result in llama.generate_all(calls))


def compile_decode(
    config: ModelConfig, plan: Plan, capacity: int, attend_len: int
) -> jax.stages.Compiled:
    """Compile the decode program at batch 1, without weights."""
    state = jax.eval_shape(lambda: init_state(config, 1, capacity, plan.cache))
    step = functools.partial(
        decode,
        Transformer(config, jnp.dtype(plan.weights), plan.kernels),
        needs=_GREEDY,
        num_steps=plan.decode_steps,
        varied=plan.varied_steps,
        attend_len=attend_len,
    )
    params, count = param_shapes(config, plan.weights), np.int32(plan.decode_steps)
    return jax.jit(step, donate_argnums=1).lower(params, state, count).compile()
