"""A program that computes only what its requests need gives the same as one that computes all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.decode import sampling
from llama_jax.decode.executor import Executor
from llama_jax.decode.model_programs import Decode, FirstToken
from llama_jax.decode.needs import ALL_NEEDS, EVERY_NEEDS, Needs, covering, needs_of, together
from llama_jax.decode.plan import accelerator_plan
from llama_jax.decode.sizes import Sizes
from llama_jax.decode.state import make_admission
from llama_jax.decode.warm_up import serving_programs
from tests.helpers.models import CONFIG, NATIVE, PURE, random_params

ON_A_GPU, ON_A_TPU = (accelerator_plan(name, "float32") for name in ("gpu", "tpu"))

ROWS = {
    Needs(): {"temperature": 0.0, "top_p": 0.5, "repetition_penalty": 1.3},
    Needs(noise=True): {"temperature": 1.5, "presence_penalty": 0.5},
    Needs(noise=True, filters=True): {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
}


def test_needs_are_those_of_the_parameters():
    def needs(logprobs=False, **params):
        return needs_of(sampling.make_params(**params), logprobs=logprobs)

    for expected, params in ROWS.items():
        assert needs(**params) == expected
        assert needs(**params, logprobs=True) == expected._replace(logprobs=True)
    below = np.nextafter(np.float32(1e-5), np.float32(0))
    assert needs(temperature=float(below)) == Needs()
    assert needs(temperature=1e-5) == Needs(noise=True)  # as the device compares: in float32
    for name, value in (("top_k", 1), ("top_p", 0.0), ("top_p", 0.999), ("min_p", 1e-3)):
        assert needs(temperature=1.0, **{name: value}) == Needs(noise=True, filters=True)
    assert needs(temperature=1.0, top_p=1.0, min_p=0.0, top_k=None) == Needs(noise=True)
    assert together([]) == Needs()
    assert together([Needs(noise=True), Needs(logprobs=True)]) == Needs(noise=True, logprobs=True)


def test_what_covers_needs_is_themselves_first_and_everything_last():
    assert len(EVERY_NEEDS) == len(set(EVERY_NEEDS)) == 6
    for needs in EVERY_NEEDS:
        found = list(covering(needs))
        assert (found[0], found[-1]) == (needs, ALL_NEEDS)
        assert found == [other for other in EVERY_NEEDS if all(map(int.__ge__, other, needs))]


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [97, pytest.param(3000, marks=pytest.mark.exhaustive)])
def test_a_program_for_more_needs_gives_the_same_tokens(vocab_size):
    rng = np.random.default_rng(0)
    shape = (8, vocab_size)
    logits = jnp.asarray(rng.normal(0, 3, shape), jnp.float32)
    state = jnp.zeros(shape), jnp.asarray(rng.random(shape) < 0.1), jnp.zeros(shape, jnp.int32)
    sample = jax.jit(sampling.sample, static_argnames=("noise", "filters"))
    for needs, params in ROWS.items():
        each = [sampling.make_params(seed=seed, **params) for seed in range(8)]
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *each)
        for step in range(5):
            args = logits, rows, jnp.full(8, step, jnp.int32), *state
            exact, *more = (
                sample(*args, noise=other.noise, filters=other.filters).tokens.tolist()
                for other in covering(needs)
                if not other.logprobs
            )
            assert all(tokens == exact for tokens in more)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(NATIVE, marks=pytest.mark.exhaustive),
        pytest.param(PURE, marks=pytest.mark.exhaustive),
        pytest.param(ON_A_GPU, marks=pytest.mark.exhaustive),
        pytest.param(ON_A_TPU, marks=pytest.mark.exhaustive),
    ],
    ids=["native", "pure", "gpu", "tpu"],
)
def test_every_program_of_a_plan_gives_the_same_tokens_and_bits(plan, request):
    """Tokens that are decoded by one or another program, and their log-probabilities."""
    if plan is NATIVE:
        request.getfixturevalue("native_kernels")
    config = dataclasses.replace(CONFIG, num_layers=1)  # all that needs decide follows the layers
    ex = Executor(config, random_params(config), "float32", batch=2, context=256, plan=plan)
    prompt = [3, 1, 4, 1, 5]

    def run(params, needs):
        new = make_admission(sampling.make_params(7, **params), prompt, 97, limit=200)
        state = ex.admit(ex.init_state(), 1, new)
        state, chunk = ex.prefill_chunk(state, 1, prompt, 0, plan.prefill_sizes[0])
        # Not `first_token` and `decode`, which may choose others.
        state, first = ex.call(FirstToken(needs), ex.params, state, 1, chunk)
        slots = ex.sizes.decode_slots([1])
        decode = Decode(len(slots), plan.decode_steps, ex.sizes.bucket(100), needs)
        parts = [first]
        for _ in range(2):
            state, outputs = ex.call(decode, ex.params, state, slots)
            column = slots.index(1)
            parts.append(jax.tree.map(lambda a, c=column: a[:, c : c + 1], outputs))
        tokens = np.concatenate([part.tokens for part in parts])
        if not needs.logprobs:
            assert all(part.logprobs is None for part in parts)
            return tokens.tolist(), None
        chosen = np.concatenate([part.logprobs.chosen for part in parts])
        return tokens.tolist(), chosen.view(np.int32).tolist()

    for needs, params in ROWS.items():
        results = {other: run(params, other) for other in covering(needs)}
        tokens, _ = results[needs]
        assert len(tokens) == 1 + 2 * plan.decode_steps
        assert [found for found, _ in results.values()] == [tokens] * len(results)
        bits = [found for _, found in results.values() if found is not None]
        assert bits == [bits[0]] * len(bits)
    if plan is ON_A_GPU:
        decodes = [name for name in ex.compiled.names if name.startswith("decode")]
        assert len(decodes) == len(EVERY_NEEDS)
        for name in decodes:
            assert_the_loop_asks_of_filters_alone(name, ex.programs[name])


def assert_the_loop_asks_of_filters_alone(name, program):
    """A GPU copies a predicate to the host and waits: a step asks once whether the head settles."""
    hlo = program.as_text()
    assert " while(" in hlo
    assert hlo.count(" conditional(") == ("filters" in name)  # this vocabulary has one head


def test_few_programs_are_compiled_before_an_accelerator_serves():
    """7B's context of 4,096: five buckets."""
    sizes = Sizes(ON_A_GPU, batch=8, context=4096)
    programs = list(serving_programs(sizes))
    assert len(programs) == len(set(programs)) == 20


@pytest.mark.parametrize(
    "needs",
    [pytest.param(Needs(), id="greedy"), pytest.param(ALL_NEEDS, marks=pytest.mark.slow, id="all")],
)
def test_the_token_loop_asks_the_device_of_filters_alone(needs):
    """The rest between, `test_every_program_of_a_plan_gives_the_same_tokens_and_bits` compiles."""
    ex = Executor(CONFIG, random_params(CONFIG), "float32", context=256, plan=ON_A_GPU)
    ex.compile(Decode(1, 16, 256, needs))
    (name,) = ex.compiled.names
    assert_the_loop_asks_of_filters_alone(name, ex.programs[name])
