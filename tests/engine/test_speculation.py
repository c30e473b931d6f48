"""Speculation changes no token: whatever drafts, however requests end, whatever slots held."""

import dataclasses
import functools
import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax import InputError, Llama
from llama_jax.decode.executor import Executor
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.drafters import check_speculation
from llama_jax.engine.engine import Engine
from llama_jax.engine.ngrams import LENGTHS, NgramDrafter, NgramIndex
from llama_jax.engine.pace import Pace, Rate
from llama_jax.nn.kernel_choice import KernelChoice
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers.drafting import (
    EagerModel,
    EagerNgrams,
    Scripted,
    at_random,
    knowing,
    mixed_requests,
    repeated,
)
from tests.helpers.engines import rest
from tests.helpers.models import CONFIG as SMALL
from tests.helpers.models import NATIVE, PURE, PURE_MARKS, random_params

CONFIG = dataclasses.replace(SMALL, eos_tokens=(2, 50))
SLOTS, DRAFTS, VOCAB = 4, 3, CONFIG.vocab_size
STRICT = PURE._replace(kernels=KernelChoice("plain", "rows", "plain", "blocks", 8))
"""Of a CPU without the kernels."""
PLANS = {"native": NATIVE._replace(prefill_sizes=(16,)), "pure": STRICT}


@pytest.fixture(scope="module", params=[pytest.param("pure", marks=PURE_MARKS), "native"])
def plan(request):
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return PLANS[request.param]


@pytest.fixture(scope="module")
def native(native_kernels):
    return PLANS["native"]


@functools.cache
def executor(plan, drafts=0, model=0):
    """One set of programs for all tests; the second model has other weights."""
    params = random_params(CONFIG)
    if model:
        rng = np.random.default_rng(model)

        def moved(leaf):
            noise = rng.normal(0, 0.02, leaf.shape)
            return leaf + jnp.asarray(noise, leaf.dtype)

        params = {name: _moved(tree, moved) for name, tree in params.items()}
    plan = plan.speculating(drafts)
    return Executor(CONFIG, params, "float32", batch=SLOTS, context=256, plan=plan)


def _moved(tree, moved):
    if isinstance(tree, dict):
        return {name: _moved(value, moved) for name, value in tree.items()}
    return moved(tree)


def engine(plan, drafter=None, **options):
    return Engine(executor(plan, DRAFTS if drafter else 0), None, drafter=drafter, **options)


def answers(engine, requests):
    generations = [engine.submit(request) for request in requests]
    rest(engine)
    assert [g.error for g in generations] == [None] * len(generations)
    return [g.result for g in generations]


def parts(result, exactly=True):
    """What must be equal; without the kernels numbers may differ in their last bits."""
    tokens = (result.tokens, result.response, result.finish_reason)
    if not exactly:
        return tokens
    return (*tokens, result.logprobs, result.prompt_logprobs, result.record.draws)


def known(requests, results):
    """The tokens of each request, with the stop token and what would follow."""
    return {
        (tuple(r.prompt_tokens), r.parameters.seed): [draw.token for draw in result.record.draws]
        for r, result in zip(requests, results, strict=True)
    }


def drafters(plan, requests, results):
    """Good ones and hostile ones."""
    own, rng = known(requests, results), random.Random(3)
    other = executor(plan, DRAFTS, model=1)
    yield "ngram", EagerNgrams()
    yield "ngram, paced", NgramDrafter()
    yield "itself", EagerModel(executor(plan, DRAFTS))
    yield "another model", EagerModel(other)
    yield "always right", knowing(own, lambda: DRAFTS)
    yield "always wrong", knowing(own, lambda: 0)
    yield "right by turns", knowing(own, lambda: rng.randrange(DRAFTS + 1))
    yield "random", at_random(VOCAB)
    yield "repeated", repeated()


def check_all(plan, count, seed):
    requests = mixed_requests(count, VOCAB, seed)
    expected = answers(engine(plan), requests)
    assert len({r.finish_reason for r in expected}) == 2
    assert any(r.finish_reason == "stop" and r.tokens for r in expected)
    bits = []
    for name, drafter in drafters(plan, requests, expected):
        work = engine(plan, drafter)
        got = answers(work, requests)
        for one, other in zip(got, expected, strict=True):
            exactly = plan.batch_invariant
            assert parts(one, exactly) == parts(other, exactly), name
            assert one.speculation is None or one.speculation.accepted <= one.speculation.drafted
        bits.append([parts(one) for one in got])
        counts = work.counts
        if name == "always wrong":
            assert counts.accepted == 0 < counts.drafted
        if name in ("always right", "itself"):
            assert counts.accepted > 0.7 * counts.drafted
            assert counts.pass_tokens > 2 * counts.passes
    # Between drafters all bits are equal by any plan: every token comes from one program.
    assert all(own == bits[0] for own in bits)


@pytest.mark.slow
def test_any_drafter_gives_the_tokens_that_there_are_without(plan):
    check_all(plan, 40, seed=1)


def test_good_and_bad_drafts_give_the_tokens_that_there_are_without(plan):
    """A few requests of one kind, which need few programs."""
    fixed = {"temperature": 0, "top_p": None, "top_k": None, "min_p": 0, "logprobs": None}
    requests = mixed_requests(8, VOCAB, 4, **fixed)
    results, rng = answers(engine(plan), requests), random.Random(9)
    by_turns = knowing(known(requests, results), lambda: rng.randrange(DRAFTS + 1))
    for drafter in (by_turns, at_random(VOCAB), EagerNgrams()):
        work = engine(plan, drafter)
        for got, want in zip(answers(work, requests), results, strict=True):
            assert parts(got, plan.batch_invariant) == parts(want, plan.batch_invariant)
        assert work.counts.drafted > 0
        assert work.counts.accepted > 0 or drafter is not by_turns


@pytest.mark.exhaustive
def test_of_500_requests_none_differs(plan):
    check_all(plan, 500, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_draft_model_draws_by_the_requests_law(native, seed):
    """With the same weights every draft is right, though answers are drawn and penalised."""
    requests = mixed_requests(
        8, VOCAB, seed, max_tokens=41, ignore_eos=True, stop=[], temperature=1.2
    )
    work = engine(native, EagerModel(executor(native, DRAFTS)))
    for result in answers(work, requests):
        # 40 after the first, by fours; of what max_tokens leaves no room for, nothing is drafted.
        assert dataclasses.astuple(result.speculation) == (30, 30, 10, 4.0)


@pytest.mark.slow
def test_a_draft_model_reads_what_was_drawn_without_it(native):
    """After steps without drafts, and in a slot that held another text."""

    class Sometimes(EagerModel):
        turns = itertools.count()

        def draft(self, slots, count):
            if next(self.turns) % 3:
                return [[] for _ in slots]
            return super().draft(slots, count)

    requests = mixed_requests(12, VOCAB, 5, max_tokens=60, ignore_eos=True, stop=[])
    work = engine(native, Sometimes(executor(native, DRAFTS)))
    results = answers(work, requests)
    assert [parts(r) for r in results] == [parts(r) for r in answers(engine(native), requests)]
    assert work.counts.accepted == work.counts.drafted > 100


@pytest.mark.slow
def test_rejected_drafts_are_never_reused_as_a_prefix(native):
    """The next prompt goes on where the answer ended: what it reuses was drawn, not drafted."""
    rng = random.Random(7)
    work = engine(native, at_random(VOCAB, seed=8))
    alone = engine(native, reuse=False)
    reused = 0
    for turn in range(12):
        (first,) = mixed_requests(1, VOCAB, turn, max_tokens=rng.randrange(18, 60))
        (result,) = answers(work, [first])
        # As far as it was drawn, further, and with other tokens in the end.
        for tail in ([], [1, 2, 3], [rng.randrange(VOCAB) for _ in range(20)]):
            prompt = [*result.prompt_tokens, *result.tokens[: rng.randrange(60)], *tail]
            (follow,) = mixed_requests(1, VOCAB, turn, prompt_tokens=prompt)
            (got,) = answers(work, [follow])
            (want,) = answers(alone, [follow])
            assert parts(got) == parts(want)
            reused += got.usage.cached_tokens
    assert reused > 300


@pytest.mark.slow
def test_cancelled_requests_leave_others_and_the_cache_as_they_are(native):
    requests = mixed_requests(16, VOCAB, 11, max_tokens=50, ignore_eos=True, stop=[])
    expected = answers(engine(native), requests)
    rng = random.Random(12)
    right = known(requests, expected)
    work = engine(native, knowing(right, lambda: rng.randrange(DRAFTS + 1)))
    generations = [work.submit(request) for request in requests]
    while work.step():
        running = [g for g in generations if not g.done and g.tokens]
        if running and rng.random() < 0.1:
            rng.choice(running).cancel()
    ends = [g.result.finish_reason for g in generations]
    assert {"cancelled", "length"} == set(ends)
    for generation, want in zip(generations, expected, strict=True):
        got = generation.result
        assert got.tokens == want.tokens[: len(got.tokens)]
        assert got.record.draws == want.record.draws[: len(got.tokens)]
    again = answers(work, requests)
    assert [parts(r) for r in again] == [parts(r) for r in expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["script", "model"])
def test_background_work_that_gives_slots_up_goes_on_with_the_same_tokens(native, kind):
    requests = mixed_requests(12, VOCAB, 17, max_tokens=50, ignore_eos=True, stop=[])
    expected = answers(engine(native), requests)
    rng = random.Random(18)
    right = knowing(known(requests, expected), lambda: rng.randrange(DRAFTS + 1))
    work = engine(native, right if kind == "script" else EagerModel(executor(native, DRAFTS)))
    generations = [work.submit(request, background=True) for request in requests[:8]]
    while work.background[0] < SLOTS or not all(g.tokens for g in generations[:SLOTS]):
        work.step()
    generations += [work.submit(request) for request in requests[8:]]
    rest(work)
    assert sum(len(g.prefix) > len(g.prompt) for g in generations) == SLOTS
    assert [parts(g.result) for g in generations] == [parts(result) for result in expected]


def test_a_rejected_draft_that_is_not_finite_leaves_no_trace(plan):
    """The token 7 has such an embedding; it is drafted, and never drawn."""
    params = executor(plan).params
    params = params | {"embed": params["embed"].at[7].set(jnp.nan)}

    def run(drafter):
        own = plan.speculating(DRAFTS if drafter else 0)
        ex = Executor(CONFIG, params, "float32", batch=2, context=256, plan=own)
        work = Engine(ex, None, drafter=drafter)
        # Long answers, then prompts that are as long as these in slots that had them.
        first = requests(0, prompt_tokens=[5, 6], max_tokens=60)
        then = requests(1, prompt_tokens=[8, 9] * 25, max_tokens=9)
        return [parts(r, plan.batch_invariant) for r in answers(work, first) + answers(work, then)]

    def requests(seed, **fixed):
        bias = {"logit_bias": {"7": -100}, "stop": [], "ignore_eos": True, "logprobs": None}
        return mixed_requests(4, VOCAB, seed, temperature=0, **fixed, **bias)

    assert run(Scripted(lambda _, count: [7] * count)) == run(None)


def test_a_drafter_that_fails_ends_the_requests_in_slots_alone(native):
    failures = [True]

    def script(generation, count):
        if failures:
            failures.pop()
            raise RuntimeError("no drafts")
        return [0] * count

    work = engine(native, Scripted(script))
    requests = mixed_requests(SLOTS + 2, VOCAB, 13, max_tokens=20, ignore_eos=True, stop=[])
    generations = [work.submit(request) for request in requests]
    rest(work)
    failed = [str(g.error) for g in generations if g.error]
    assert failed == ["no drafts"] * len(failed)
    assert 1 <= len(failed) <= SLOTS
    whole = [(g, r) for g, r in zip(generations, requests, strict=True) if g.result]
    want = answers(engine(native), [request for _, request in whole])
    assert [parts(g.result) for g, _ in whole] == [parts(r) for r in want]


@pytest.mark.slow
def test_after_warm_up_no_request_compiles(plan):
    """Of the programs that serve every request; those for fewer needs are compiled beside."""
    own = Executor(
        CONFIG,
        random_params(CONFIG),
        "float32",
        batch=2,
        context=256,
        plan=plan._replace(prefill_sizes=(64,)).speculating(DRAFTS),
    )
    small = Executor(CONFIG, random_params(CONFIG), "float32", batch=2, context=256, plan=own.plan)
    work = Engine(own, None, drafter=EagerModel(small))
    progress = list(work.warm_up())
    assert progress == [(i + 1, len(progress)) for i in range(len(progress))]
    compiled = len(own.compiled.names), len(small.compiled.names)
    assert sum(compiled) == len(progress)
    assert any(name.startswith("verify(") for name in own.compiled.names)
    answers(work, mixed_requests(6, VOCAB, 21))
    assert (len(own.compiled.names), len(small.compiled.names)) == compiled


def test_counts_and_results_say_what_was_drafted(native):
    requests = mixed_requests(
        6, VOCAB, 31, max_tokens=13, ignore_eos=True, stop=[], prompt_tokens=[3, 4]
    )
    right = known(requests, answers(engine(native), requests))
    work = engine(native, knowing(right, lambda: 1))
    results = answers(work, requests)
    for result in results:
        assert result.speculation == dataclasses.replace(
            result.speculation, passes=6, accepted=6, tokens_per_pass=2.0
        )
        assert result.to_dict()["speculation"]["accepted"] == 6
    assert work.counts.drafted == sum(result.speculation.drafted for result in results)
    assert (work.counts.accepted, work.counts.passes, work.counts.pass_tokens) == (36, 36, 72)
    assert answers(engine(native), requests)[0].speculation is None


# Pace.


def choose(pace, rates, drafts, count=1, windows=(4,)):
    return pace.choose(count, windows, rates, drafts)


def test_what_is_never_accepted_is_hardly_ever_verified():
    """Less than one pass in fifty, though drafts are there in every turn."""
    pace, rate = Pace(is_free=True), Rate(0.25)
    verified = 0
    for _ in range(1000):
        width = choose(pace, [rate], [3])
        verified += width > 1
        pace.observe(1, width, 1.3 if width > 1 else 1.0)
        rate.observe(0, 3)
    assert verified <= 20


def test_what_is_accepted_is_verified_from_then_on():
    pace, rate = Pace(is_free=True), Rate(0.05)
    assert choose(pace, [rate], [3]) == 1
    for _ in range(3):
        rate.observe(3, 3)
    assert choose(pace, [rate], [3]) == 4
    assert choose(pace, [rate], [0]) == 1


def test_many_slots_with_poor_drafts_decode_without():
    pace = Pace(is_free=True)
    rates = [Rate(0.5) for _ in range(8)]
    for rate in rates:
        rate.observe(1, 3)
    assert choose(pace, rates[:1], [3]) == 4
    assert choose(pace, rates, [3] * 8, count=8) == 1
    # Where only one of many has drafts it pays even less.
    rates[0].observe(3, 3)
    assert choose(pace, rates, [3] + [0] * 7, count=8) == 1


def test_a_slow_pass_does_not_decide_for_ever():
    pace, rate = Pace(is_free=True), Rate(0.9)
    pace.observe(1, 1, 1.0)
    pace.observe(1, 4, 50.0)
    turns = 0
    while choose(pace, [rate], [3]) == 1:
        turns += 1
        assert turns < 1000
    assert turns > 50


def test_costs_are_those_that_were_timed():
    pace = Pace(is_free=True)
    pace.observe(1, 1, 1.0)
    for seconds in (1.5, 1.5, 9.0):
        pace.observe(1, 4, seconds)
    assert pace.cost(1, 4) == 1.5
    assert pace.cost(2, 4) != 1.5


def test_the_window_is_as_wide_as_is_likely_to_be_accepted():
    pace, sure, unsure = Pace(is_free=True), Rate(0.5), Rate(0.5)
    for _ in range(20):
        sure.observe(7, 7)
        unsure.observe(1, 7)
    assert choose(pace, [sure], [7], windows=(4, 8)) == 8
    assert choose(pace, [unsure], [7], windows=(4, 8)) == 4
    assert choose(pace, [sure], [2], windows=(4, 8)) == 4


# N-grams.


def by_search(text, count):
    """What followed the last tokens where they last occurred, found by search."""
    for length in LENGTHS:
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                longer = list(text)
                for i in range(count):
                    longer.append(longer[start + length + i])
                return longer[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_drafts_are_what_followed_the_last_occurrence(text, count, cut):
    index = NgramIndex()
    index.extend(text[:cut])
    index.extend(text[cut:])
    assert index.draft(count) == by_search(text, count)
    assert len(index) == len(text)


# What a user names.


def test_what_cannot_draft_is_refused(tmp_path):
    for tokens in (0, 16, 3.0, True):
        with pytest.raises(InputError, match=r"speculate_tokens is .+, expected 1 to 15"):
            check_speculation("ngram", tokens)
    assert check_speculation(None, 3) == check_speculation("off", 3) == 0
    with pytest.raises(InputError, match="nowhere"):
        Llama.load(speculate=tmp_path / "nowhere")


@pytest.mark.slow
def test_llama_speculates_and_its_receipts_are_the_same(native_kernels):
    demo = load_checkpoint(DEMO_CHECKPOINT)
    request = {
        "prompt": "Tell me a story about a llama.",
        "seed": 5,
        "max_tokens": 60,
        "temperature": 0.8,
    }

    def run(**options):
        result = Llama(demo, slots=2, **options).generate(**request)
        receipt = result.receipt()
        del receipt["predicate"]["runDetails"]["metadata"]
        return result, receipt

    plain, receipt = run()
    for speculate in ("ngram", DEMO_CHECKPOINT):
        result, own = run(speculate=speculate, speculate_tokens=5)
        assert own == receipt
        assert result.fingerprint == plain.fingerprint
        assert result.speculation.passes > 0
    # All but what it drafts after the end.
    assert result.speculation.accepted >= result.speculation.drafted - 5 > 30
