"""Bits that depend on the request alone, by every plan of a CPU without the kernels.

On a GPU or TPU these are the tests of its own plan.
"""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.decode import plan as plans
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import accelerator_plan, choose_plan
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import make_request
from llama_jax.errors import InputError
from llama_jax.nn.cache import init_cache
from llama_jax.nn.transformer import Transformer, forward
from tests.helpers.models import CONFIG as SMALL
from tests.helpers.models import random_params

CONFIG = dataclasses.replace(SMALL, vocab_size=500, dim=128, ffn_dim=352, num_layers=1)

exhaustive = pytest.mark.exhaustive
EVERY_PLAN = [
    pytest.param("float32", 2**40, marks=exhaustive),
    pytest.param("float16", 2**40, marks=exhaustive),
    pytest.param("float16", 0, marks=exhaustive),  # too little memory for float32 weights
    pytest.param("bfloat16", 2**40, marks=pytest.mark.slow),
]


@pytest.fixture
def strict(monkeypatch):
    """Return the strict plan: of a CPU without the kernels, else of the device that is there."""

    def plan(dtype, memory):
        monkeypatch.setattr(plans, "has_kernels", lambda: False)
        monkeypatch.setattr(plans, "total_memory", lambda: memory)
        return choose_plan(CONFIG, dtype)

    return plan


def test_strict_is_the_default_and_another_word_is_refused(strict):
    assert strict("float32", 2**40).slots_invariant
    assert choose_plan(CONFIG, "float32", "fast").kernels.decode_rows is None
    for platform in ("gpu", "tpu"):
        assert accelerator_plan(platform, "bfloat16").slots_invariant
        assert not accelerator_plan(platform, "bfloat16", "fast").slots_invariant
    for model in (CONFIG, "gpu"):
        choose = choose_plan if model is CONFIG else accelerator_plan
        with pytest.raises(InputError, match="determinism is 'loose', expected strict or fast"):
            choose(model, "float32", "loose")


@pytest.mark.parametrize(("dtype", "memory"), EVERY_PLAN)
def test_a_logit_depends_on_its_own_sequence_alone(strict, dtype, memory):
    """Not on how many are decoded with it, nor on how many positions are attended to."""
    plan, rng = strict(dtype, memory), np.random.default_rng(1)
    params = random_params(CONFIG, jnp.dtype(plan.weights))
    model = Transformer(CONFIG, jnp.dtype(plan.weights), plan.kernels)
    shapes = jax.eval_shape(lambda: init_cache(CONFIG, 11, 1024, plan.cache))
    cache = jax.tree.map(
        lambda a: (
            jnp.asarray(rng.normal(0, 1, a.shape), jnp.float32)
            .astype("bfloat16" if a.dtype == jnp.uint16 else a.dtype)
            .view(a.dtype)
        ),
        shapes,
    )
    tokens = jnp.asarray(rng.integers(0, 500, (11, 1)), jnp.int32)
    starts = jnp.asarray(rng.integers(0, 250, 11), jnp.int32)
    decode = jax.jit(forward, static_argnums=0, static_argnames="attend_len")

    def bits(first, last, attend_len):
        part = slice(first, last)
        own = jax.tree.map(lambda a: a[part], cache)
        logits, _ = decode(model, params, tokens[part], starts[part], own, attend_len=attend_len)
        return np.asarray(logits).view(np.int32)

    expected = bits(0, 8, 256)
    assert len(np.unique(expected)) > expected.size / 2
    for first, last, attend_len in (
        *((0, 1, 256), (3, 4, 256), (5, 7, 256), (0, 8, 512), (7, 8, 1024), (2, 5, 1024)),
        *((0, 11, 256), (0, 11, 1024)),
    ):
        got = bits(first, last, attend_len)
        np.testing.assert_array_equal(got[: 8 - first], expected[first:last])


@pytest.mark.parametrize(("dtype", "memory"), EVERY_PLAN)
def test_tokens_and_logprobs_do_not_depend_on_slots_or_neighbours(strict, dtype, memory):
    """One slot, two and eight; prompts of all buckets at once; read anew or from the cache."""
    plan, rng = strict(dtype, memory), random.Random(2)
    params = random_params(CONFIG, jnp.dtype(dtype))
    requests = [
        make_request(
            prompt_tokens=[rng.randrange(500) for _ in range(length)],
            max_tokens=rng.randrange(8, 20),
            seed=length,
            temperature=rng.choice([0, 1.5]),
            top_p=rng.choice([None, 0.9]),
            logprobs=5,
            ignore_eos=True,
        )
        for length in (5, 70, 130, 249, 258, 300, 400, 509)
    ]

    def answers(slots, order, reuse):
        ex = Executor(CONFIG, params, dtype, batch=slots, context=600, plan=plan)
        engine = Engine(ex, None, reuse=reuse)
        generations = [engine.submit(request) for request in order]
        while engine.step():
            pass
        found = {}
        for request, generation in zip(order, generations, strict=True):
            result = generation.result
            numbers = [(each.logprob, *(p for _, p in each.top)) for each in result.logprobs]
            bits = np.asarray(numbers, np.float32).view(np.int32).tolist()
            found.setdefault(request.parameters.seed, []).append((result.tokens, bits))
        return found

    expected = answers(1, requests, reuse=False)
    twice = [*requests, *requests]
    for slots, order, reuse in ((2, requests, False), (8, rng.sample(twice, 16), True)):
        got = answers(slots, order, reuse)
        for seed, [alone] in expected.items():
            assert all(each == alone for each in got[seed]), (slots, seed)
