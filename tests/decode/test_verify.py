"""A pass over drafts leaves what as many decode steps leave, and draws what they draw."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax.decode import sampling
from llama_jax.decode.executor import Executor
from llama_jax.decode.model_programs import Decode
from llama_jax.decode.plan import accelerator_plan, choose_plan
from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.decode.sizes import MAX_WINDOW_ROWS, Sizes
from llama_jax.decode.state import make_admission
from llama_jax.decode.warm_up import drafting_programs, serving_programs
from llama_jax.decode.window_programs import Draft, Verify
from tests.helpers.models import CONFIG as SMALL
from tests.helpers.models import NATIVE, PURE, PURE_MARKS, random_params

ENDS = (11, 96)
CONFIG = dataclasses.replace(SMALL, eos_tokens=ENDS)
SLOTS, DRAFTS = 4, 3
ROWS = [
    {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.3, "presence_penalty": 1.0, "top_p": 0.9},
    {"temperature": 0.9, "frequency_penalty": 1.2, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 0.7},
]


def executor(plan, **changes):
    sizes = {"batch": SLOTS, "context": 200} | changes
    return Executor(CONFIG, random_params(CONFIG), "float32", plan=plan, **sizes)


@pytest.fixture(scope="module", params=[pytest.param("pure", marks=PURE_MARKS), "native"])
def ex(request):
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    plan = {"pure": PURE, "native": NATIVE}[request.param]
    return executor(plan._replace(prefill_sizes=(16,), decode_steps=1).speculating(DRAFTS))


def begun(ex, limit=50, stop_tokens=(NO_TOKEN, NO_TOKEN)):
    """A state of slots that have their first token."""
    state = ex.init_state()
    for slot, params in enumerate(ROWS):
        prompt = [(7 * slot + 3 * i) % 97 for i in range(5 + 4 * slot)]
        rows = sampling.make_params(seed=slot, **params)
        new = make_admission(rows, prompt, 97, limit=limit, stop_tokens=stop_tokens)
        state = ex.admit(state, slot, new)
        state, _ = ex.prefill(state, slot, prompt)
    return state


def host(tree):
    return jax.tree.map(np.asarray, tree)


def copied(state):
    """The same state in arrays of its own: a call consumes the first."""
    return jax.tree.map(lambda array: array + 0 if array.dtype != bool else array | False, state)


def steps(ex, state, count):
    """What so many decode steps draw, with the state after each."""
    outputs, states = [], [host(state)]
    for _ in range(count):
        state, new, _ = ex.decode(state, range(SLOTS), 100)
        outputs.append(host(new))
        states.append(host(state))
    return outputs, states


def held(state, slot):
    """What a slot has, with its cache up to its position."""
    entries = jax.tree.map(lambda a: a[slot], state._replace(cache=()))
    cache = jax.tree.map(lambda a: a[slot, :, : state.positions[slot]], state.cache)
    return entries._replace(cache=cache)


def assert_equal(got, want, exactly):
    if exactly:
        jax.tree.map(np.testing.assert_array_equal, got, want)
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)


def verified_as_steps(ex, drafts, **begin):
    """Hold one pass against steps; `drafts` gives those of a slot, knowing what will be drawn.

    Returns:
        How many tokens each slot drew.
    """
    state = begun(ex, **begin)
    outputs, states = steps(ex, copied(state), DRAFTS + 1)
    expected = np.stack([out.tokens[0] for out in outputs])
    own = {slot: drafts(slot, expected[:, slot].tolist()) for slot in range(SLOTS)}
    state, got, computed = ex.verify(state, own, DRAFTS + 1, 100)
    assert computed == list(range(SLOTS))
    state, got = host(state), host(got)
    counts = []
    for slot in range(SLOTS):
        count = int(np.sum(got.tokens[:, slot] != NO_TOKEN))
        counts.append(count)
        right = next((i for i, d in enumerate(own[slot]) if d != expected[i, slot]), len(own[slot]))
        drawable = int(np.sum(expected[:, slot] != NO_TOKEN))
        assert count == min(right + 1, drawable)
        np.testing.assert_array_equal(got.tokens[:count, slot], expected[:count, slot])
        for i in range(count):
            rows = (got.measures[i, slot], outputs[i].measures[0, slot])
            tops = jax.tree.map(lambda a, i=i, slot=slot: a[i, slot], got.logprobs)
            want = jax.tree.map(lambda a, slot=slot: a[0, slot], outputs[i].logprobs)
            assert_equal((rows[0], tops), (rows[1], want), ex.plan.batch_invariant)
        assert_equal(held(state, slot), held(states[count], slot), ex.plan.batch_invariant)
    return counts


@pytest.mark.parametrize("right", range(DRAFTS + 1))
def test_a_window_draws_and_leaves_what_decode_steps_do(ex, right):
    """Whether 0, 1, 2 or all drafts are right: penalties count what each place has before it."""

    def drafts(slot, expected):
        own = expected[:DRAFTS]
        if right < DRAFTS:
            own[right] = (own[right] + 1) % 97
        return own

    assert verified_as_steps(ex, drafts) == [right + 1] * SLOTS


def test_each_slot_of_a_pass_has_a_window_of_its_own(ex):
    def drafts(slot, expected):
        return expected[:slot]

    assert verified_as_steps(ex, drafts) == [1, 2, 3, 4]


@pytest.mark.parametrize("left", range(1, DRAFTS + 2))
def test_max_tokens_ends_a_window(ex, left):
    """At each place, though all drafts are right."""
    assert verified_as_steps(ex, lambda _, own: own[:DRAFTS], limit=1 + left) == [left] * SLOTS


@pytest.mark.parametrize("place", range(DRAFTS + 1))
def test_a_stop_token_ends_a_window(ex, place):
    outputs, _ = steps(ex, begun(ex), DRAFTS + 1)
    stop = int(outputs[place].tokens[0, 0])
    counts = verified_as_steps(ex, lambda _, own: own[:DRAFTS], stop_tokens=(stop, NO_TOKEN))
    first = next(i for i, out in enumerate(outputs) if out.tokens[0, 0] == stop)
    assert counts[0] == first + 1


def test_a_slot_that_is_done_stays_as_it_is(ex):
    """Its window writes to its cache beyond its position only."""
    state = ex.release(begun(ex), 2)
    before = held(host(state), 2)
    state, outputs, _ = ex.verify(state, {0: [5] * 3, 1: [5] * 3, 3: [5] * 3}, DRAFTS + 1, 100)
    assert np.all(np.asarray(outputs.tokens)[:, 2] == NO_TOKEN)
    assert_equal(held(host(state), 2), before, exactly=True)


def test_a_window_at_the_end_of_the_context_has_room():
    """The cache is longer than the context by a window."""
    for plan in (PURE, NATIVE, accelerator_plan("gpu", "float32")):
        for context in (1, 100, 128, 250, 256, 511, 512):
            for drafts in (1, 3, 15):
                sizes = Sizes(plan.speculating(drafts), 2, context)
                assert sizes.capacity >= context + drafts
                assert sizes.capacity % 128 == 0


def test_without_speculation_there_are_the_same_programs():
    sizes = Sizes(NATIVE, 8, 512)
    programs = list(serving_programs(sizes))
    assert not any(isinstance(program, Verify | Draft) for program in programs)
    assert NATIVE.speculating(0) == NATIVE
    assert Sizes(NATIVE, 8, 512).capacity == 512


def test_windows_and_programs_are_those_of_the_plan():
    plan = NATIVE.speculating(7)
    assert (plan.windows, NATIVE.windows, PURE.speculating(7).windows) == ((4, 8), (), (8,))
    assert NATIVE.speculating(3).windows == (4,)
    assert NATIVE.speculating(15).windows == (4, 8, 16)
    sizes = Sizes(plan, 8, 512)
    kinds = {(p.num_slots, p.width) for p in serving_programs(sizes) if isinstance(p, Verify)}
    assert kinds == {(1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (8, 4)}
    assert all(count * width <= MAX_WINDOW_ROWS for count, width in kinds)
    # Where bits may depend on the program, all tokens come from one.
    for fixed in (PURE, accelerator_plan("tpu", "float32")):
        programs = list(serving_programs(Sizes(fixed.speculating(7), 3, 512)))
        assert not any(isinstance(program, Decode) for program in programs)
        assert {(p.num_slots, p.width) for p in programs if isinstance(p, Verify)} == {(3, 8)}
    drafting = [p for p in drafting_programs(sizes) if isinstance(p, Draft)]
    assert {(p.num_slots, p.num_drafts + 1) for p in drafting} == kinds


def test_one_call_is_in_flight_while_drafts_are_made():
    plan = accelerator_plan("gpu", "bfloat16")
    assert (plan.max_in_flight, plan.speculating(4).max_in_flight) == (2, 1)
    assert choose_plan(CONFIG, "float32").speculating(0).draft_tokens == 0
