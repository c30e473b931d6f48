"""How whole programs run: steps per dispatch, chunks of a prompt, and the draw of a token."""

import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.choices.setting import Setting
from benchmarks.choices.trial import Trial, median_seconds, time_call
from benchmarks.engines import protocol
from benchmarks.model_cost import decode_cost, prefill_cost
from benchmarks.programs import draw_tokens, read_prompt, set_rows
from llama_jax.decode import sampling as samplers
from llama_jax.decode.plan import Plan, choose_plan


def steps(setting: Setting) -> Iterator[Trial]:
    """Time greedy decoding at batch 1 by steps per dispatch and dispatches in flight."""
    size = setting.size
    for dtype in setting.dtypes:
        plan = choose_plan(setting.config, dtype)
        ways: list[tuple[str, int, tuple[int, ...]]]
        ways = [(plan.kernels.attention, count, (1, 2)) for count in size.steps]
        if len(size.steps) == 1:
            ways = [(plan.kernels.attention, size.steps[0], (plan.max_in_flight,))]
        elif setting.on_gpu:
            ways.insert(1, ("blocks", size.steps[0], (2,)))
        for form, count, in_flight in ways:
            changed = plan._replace(
                decode_steps=count, kernels=plan.kernels._replace(attention=form)
            )
            for dispatches in in_flight:
                yield Trial(
                    {"dtype": dtype},
                    f"{count} steps, {dispatches} in flight, {form}",
                    functools.partial(_time_decode, setting, dtype, changed, dispatches),
                    decode_cost(
                        setting.config,
                        dtype,
                        batch=1,
                        context=size.context,
                        new_tokens=size.new_tokens,
                    ),
                    dtype,
                    tokens=size.new_tokens,
                )


def _time_decode(setting: Setting, dtype: str, plan: Plan, dispatches: int) -> float:
    size = setting.size
    run = setting.executor(dtype, plan, size.context + size.new_tokens)
    state = run.init_state()

    def once() -> float:
        nonlocal state
        state = set_rows(run, state, size.context, size.new_tokens)
        began = time.perf_counter()
        state = draw_tokens(run, state, size.context, size.new_tokens, dispatches)
        return time.perf_counter() - began

    return median_seconds(once, setting.size.seconds)


def prefill(setting: Setting) -> Iterator[Trial]:
    """Time prompts by the largest chunk; what no prompt fills is no different from a smaller."""
    prompts = [n for n in setting.size.prompts if n < setting.config.max_seq_len]
    for dtype in setting.dtypes:
        plan = choose_plan(setting.config, dtype)
        for tokens in prompts:
            for end in setting.size.ladders:
                if end > max(tokens, min(setting.size.ladders)):
                    continue
                sizes = tuple(2**i for i in range(4, end.bit_length()))
                changed = plan._replace(prefill_sizes=sizes)
                yield Trial(
                    {"tokens": tokens, "dtype": dtype},
                    f"chunks of {end}",
                    functools.partial(_time_prefill, setting, dtype, changed, tokens),
                    prefill_cost(setting.config, dtype, tokens=tokens),
                    dtype,
                    tokens=tokens,
                )


def _time_prefill(setting: Setting, dtype: str, plan: Plan, tokens: int) -> float:
    # Room for every prompt: they share the executor, and what it has compiled.
    room = [n for n in setting.size.prompts if n < setting.config.max_seq_len]
    run = setting.executor(dtype, plan, max(room))
    prompt = protocol.prompt(tokens, setting.config.vocab_size)
    state = run.init_state()

    def once() -> float:
        nonlocal state
        began = time.perf_counter()
        state = read_prompt(run, state, prompt)
        return time.perf_counter() - began

    return median_seconds(once, setting.size.seconds)


def sampling(setting: Setting) -> Iterator[Trial]:
    """Time the draw of one token per row, by what requests ask for."""
    requests = {
        "greedy": {},
        "temperature": {"temperature": 0.7},
        "top_k": {"temperature": 0.7, "top_k": 40},
        "top_p": {"temperature": 0.7, "top_p": 0.9},
        "all": {
            "temperature": 0.7,
            "top_k": 40,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.1,
        },
    }
    for batch in setting.size.batches:
        for name, request in requests.items():
            params = samplers.make_params(1, **request)
            yield Trial(
                {"batch": batch, "request": name},
                "one draw",
                functools.partial(_time_draw, setting, batch, params),
            )


def _time_draw(setting: Setting, batch: int, params: samplers.SamplingParams) -> float:
    """Return the seconds of one draw, among several in a loop as in the program of decoding."""
    vocab_size, draws = setting.config.vocab_size, setting.size.draws
    logits = jax.random.normal(jax.random.key(0), (batch, vocab_size))
    rows = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), batch, axis=0), params)
    in_prompt = jnp.zeros((batch, vocab_size), bool)

    @jax.jit
    def run(logits: jax.Array, rows: samplers.SamplingParams) -> jax.Array:
        def draw(carry: tuple[jax.Array, jax.Array], step: jax.Array) -> tuple:
            before, counts = carry
            # What was drawn enters the next logits, or much would be computed once for all.
            tokens = samplers.sample(
                logits + 1e-6 * before.astype(jnp.float32)[:, None],
                rows,
                jnp.full((batch,), step),
                in_prompt,
                counts,
            )
            return (tokens, counts.at[jnp.arange(batch), tokens].add(1)), None

        start = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, vocab_size), jnp.int32)
        return lax.scan(draw, start, jnp.arange(draws, dtype=jnp.int32))[0][0]

    return time_call(lambda: run(logits, rows), setting.size.seconds, parts=draws)
