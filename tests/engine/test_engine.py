"""Many requests at once are each answered as if alone, and none is lost, whatever happens."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import random
import re
import threading
import time
import weakref

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from llama_jax import Llama
from llama_jax.decode.executor import Executor
from llama_jax.decode.model_programs import FirstToken, Score
from llama_jax.decode.needs import Needs
from llama_jax.decode.plan import choose_plan
from llama_jax.decode.warm_up import serving_programs
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.delivery import NotFiniteError
from llama_jax.engine.engine import MAX_FAILURES, Engine
from llama_jax.engine.fair_lock import FairLock
from llama_jax.engine.generation import Generation
from llama_jax.engine.queue import Queue
from llama_jax.engine.refusals import ContextError, EngineFailedError, QueueFullError
from llama_jax.engine.request import make_request
from llama_jax.engine.result import Piece
from llama_jax.engine.stream import Stream
from llama_jax.text.chat import encode_dialog
from llama_jax.text.tokenizer import EOS_ID, Tokenizer
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers.engines import rest
from tests.helpers.models import CONFIG, NATIVE, PURE, PURE_MARKS, random_params
from tests.helpers.serving import wait_until
from tools.demo_corpus import read_corpus

DEMO = load_checkpoint(DEMO_CHECKPOINT)
TOKENIZER = Tokenizer(DEMO.tokenizer)
QUESTIONS = [phrasings[0] for phrasings, _ in read_corpus().questions[:50]]
SLOTS = 5  # of which three are computed as four, where a plan computes only some
SIZES = (16, 64)  # few to compile, and many chunks to a prompt
PLANS = {
    name: plan._replace(prefill_sizes=SIZES) for name, plan in (("pure", PURE), ("native", NATIVE))
}


@functools.cache
def warm_executor(plan):
    """The demo model by a plan, all of its programs compiled."""
    ex = Executor(DEMO.config, DEMO.params, "float32", batch=SLOTS, context=512, plan=plan)
    progress = list(ex.warm_up())
    assert progress == [(i + 1, len(progress)) for i in range(len(progress))]
    return ex, set(ex.compiled.names)


@pytest.fixture(scope="module", params=[pytest.param("pure", marks=PURE_MARKS), "native"])
def plan(request):
    """Both of the plans that a CPU may have."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return PLANS[request.param]


@pytest.fixture(scope="module")
def any_ex(plan):
    """For laws that a plan could break."""
    return warm_executor(plan)[0]


@pytest.fixture(scope="module")
def ex():
    """For what is the host's alone: by this machine's plan."""
    return warm_executor(choose_plan(DEMO.config, "float32")._replace(prefill_sizes=SIZES))[0]


@pytest.fixture
def llm(ex):
    """A Llama of that executor, none of whose programs is compiled anew."""
    llm = Llama(DEMO, slots=SLOTS)
    llm.executor, llm.engine = ex, make(ex)
    return llm


def changed(ex, **changes):
    """The executor by a changed plan; programs of the same name are not compiled anew."""
    other = copy.copy(ex)
    other.plan = ex.plan._replace(**changes)
    other.sizes = dataclasses.replace(ex.sizes, plan=other.plan)
    return other


def answer(engine, request):
    generation = engine.submit(request)
    rest(engine)
    return generation


def make(ex, **options):
    """An engine, with the tokenizer if the model is the demo."""
    return Engine(ex, TOKENIZER if ex.config == DEMO.config else None, **options)


def alone(ex, request):
    """The answer of a fresh engine that does nothing else."""
    generation = answer(make(ex), request)
    assert generation.reused == 0
    return generation


def question(i=0, **parameters):
    return make_request(**{"prompt": QUESTIONS[i], "seed": i, **parameters})


def endless(i=0, **parameters):
    """A question whose answer does not end before its limit."""
    return question(i, **{"ignore_eos": True, "max_tokens": 60, "temperature": 1.0, **parameters})


def read(generation):
    """Take what pieces there are; return their text, tokens and logprobs."""
    pieces = []
    while piece := generation.take():
        pieces.append(piece)
    return (
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [logprob for piece in pieces for logprob in piece.logprobs],
    )


def numbers(logprobs):
    """Tokens and their logprobs as one list of numbers."""
    scored = [each for each in logprobs or [] if each is not None]
    return [n for each in scored for pair in [(each.token, each.logprob), *each.top] for n in pair]


def assert_same(generation, other):
    """Of two generations: equal tokens and text; logprobs but for the last bit of a sum."""
    assert (generation.error, other.error) == (None, None)
    ours, theirs = generation.result, other.result
    assert ours.tokens == theirs.tokens
    assert (ours.response, ours.finish_reason) == (theirs.response, theirs.finish_reason)
    for name in ("logprobs", "prompt_logprobs"):
        pair = [getattr(result, name) for result in (ours, theirs)]
        np.testing.assert_allclose(*map(numbers, pair), atol=1e-5, rtol=0)


def draw_request(rng, earlier, vocab_size=DEMO.config.vocab_size):
    """A request of any kind; a third of the prompts go on from a part of an earlier one."""
    prompt = [rng.randrange(3, vocab_size) for _ in range(rng.choice([1, 9, 16, 17, 64, 130, 300]))]
    kind = rng.randrange(3)
    if kind == 0 and earlier:
        longest = max(rng.choices(earlier, k=3), key=len)
        prompt = longest[: rng.randrange(400)] + prompt[:40]
    if kind == 1:
        messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
        prompt = encode_dialog(messages, TOKENIZER)
    earlier.append(prompt)
    return make_request(
        prompt_tokens=prompt,
        seed=rng.randrange(2**64),
        max_tokens=rng.choice([0, 1, 2, 8, 9, 10, 40, 64]),
        temperature=rng.choice([0, 0.6, 1, 2.5]),
        top_k=rng.choice([None, None, 5, 40]),
        top_p=rng.choice([None, None, 0.9, 0.5]),
        repetition_penalty=rng.choice([1, 1.3]),
        frequency_penalty=rng.choice([0, 0.5]),
        presence_penalty=rng.choice([0, 0.5]),
        stop=rng.choice([(), (), ("e",), ("Paris", "a t")]),
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice([None, None, 0, 3]),
        prompt_logprobs=rng.random() < 0.15,
        min_p=rng.choice([0, 0, 0.05, 0.5]),
        logit_bias=rng.choice([None, None, {EOS_ID: 5, 300: 8, 40: -100}]),
        allowed_tokens=rng.choice([None] * 5 + [range(2, vocab_size, 3)]),
    )


def test_each_of_64_requests_at_once_is_answered_as_if_alone(any_ex, monkeypatch):
    """Of any length and parameters, arriving whenever, with others given up between them."""
    rng, earlier, generations, copies_of_busy = random.Random(2), [], [], []
    engine = make(any_ex)
    copy_slot = engine._scheduler.pipeline.copy_slot

    def noted(source, target):
        copies_of_busy.extend([source] if source.generation else [])
        copy_slot(source, target)

    monkeypatch.setattr(engine._scheduler.pipeline, "copy_slot", noted)
    for _ in range(64):
        generations.append(engine.submit(draw_request(rng, earlier)))
        for _ in range(rng.choice([0, 0, 0, 1, 2, 6])):
            engine.step()
        going = [generation for generation in generations if not generation.done]
        if going and rng.random() < 0.2:
            rng.choice(going).cancel()
    rest(engine)
    reasons = [generation.result.finish_reason for generation in generations]
    assert min(reasons.count(reason) for reason in ("stop", "length", "cancelled")) > 5
    assert engine.counts.cached_tokens >= any_ex.plan.reuse_multiple
    # Reused by 64 tokens, the prompts of the mixture rarely have a beginning in a busy slot.
    assert copies_of_busy or not any_ex.plan.batch_invariant
    for generation in generations:
        text, tokens, logprobs = read(generation)
        result = generation.result
        assert (text, tokens) == (result.response, result.tokens)
        assert logprobs == (result.logprobs or [])
        expected = alone(any_ex, generation.request)
        if result.finish_reason == "cancelled":
            assert tokens == expected.tokens[: len(tokens)]
        else:
            assert_same(generation, expected)


# A prompt's beginning that is in the cache already.


def draw_ids(seed, count, ex):
    return np.random.default_rng(seed).integers(3, ex.config.vocab_size, count).tolist()


def sampled(prompt, **parameters):
    """A request whose tokens and logprobs depend on every token of its prompt."""
    defaults = {"seed": 5, "temperature": 0.8, "max_tokens": 12, "ignore_eos": True, "logprobs": 3}
    return make_request(prompt_tokens=prompt, **defaults | parameters)


def spy(monkeypatch, ex, name):
    """Note the calls of one of an executor's methods: its arguments but the state."""
    method, calls = getattr(ex, name), []

    def noted(state, *args):
        calls.append(args)
        return method(state, *args)

    monkeypatch.setattr(ex, name, noted)
    return calls


def test_what_is_reused_changes_no_token(any_ex, monkeypatch):
    """For prompts that share beginnings of many lengths with one before, and go on or do not."""
    unit, text = any_ex.plan.reuse_multiple, draw_ids(0, 300, any_ex)
    copies, kept = spy(monkeypatch, any_ex, "copy_slot"), 0
    for shared in (1, unit - 1, unit, unit + 1, 2 * unit, 250, 299, 300):
        for more in (0, 1, 30):
            prompt = text[:shared] + draw_ids(shared, more, any_ex)
            engine = make(any_ex)
            answer(engine, sampled(text))
            before = len(copies)
            generation = answer(engine, sampled(prompt))
            assert generation.reused == min(shared, len(prompt) - 1) // unit * unit
            assert generation.reused == generation.result.usage.cached_tokens
            assert generation.reused == engine.counts.cached_tokens
            kept += generation.reused > 0 and len(copies) == before
            assert_same(generation, alone(any_ex, sampled(prompt)))
    assert min(len(copies), kept) > 2  # some were copied, some used where they were


def test_a_conversation_is_read_on_turn_by_turn(any_ex):
    """With the answers' tokens, where they have the same bits as those of a prompt.

    But for the last, which is not in the cache. The first prompt is of such a length that with one
    token more, here the answer's last and there any of it, more would be reusable.
    """
    unit, invariant = any_ex.plan.reuse_multiple, any_ex.plan.batch_invariant
    engine, held = make(any_ex), 0
    history = draw_ids(3, unit + 4 if invariant else 2 * unit - 5, any_ex)
    for turn in range(5):
        generation = answer(engine, sampled(history, seed=turn))
        assert generation.reused == held // unit * unit
        assert_same(generation, alone(any_ex, generation.request))
        held = len(history) + (11 if invariant else 0)
        history = [*history, *generation.tokens, *draw_ids(turn, 20, any_ex)]


@pytest.mark.parametrize("ending", ["eos", "limit", "stop string", "cancel"])
def test_what_an_answer_left_is_right_however_it_ended(ex, ending):
    """For every length of the prompt that a reusable one can end on."""
    unit = ex.plan.reuse_multiple
    for length in range(unit + 1, unit + 17, 3):
        prompt = draw_ids(length, length, ex)
        parameters = {"eos": {"ignore_eos": False}, "stop string": {"stop": "e"}}.get(ending, {})
        engine = make(ex)
        first = engine.submit(sampled(prompt, **{"max_tokens": 40, **parameters}))
        while not first.done and (ending != "cancel" or len(first.tokens) < 9):
            engine.step()
        first.cancel()
        rest(engine)
        again = answer(engine, sampled([*prompt, *first.tokens, 5, 6]))
        assert again.reused >= unit
        assert_same(again, alone(ex, again.request))


@pytest.mark.parametrize("held", [0, 70])
def test_a_prompt_given_up_leaves_what_was_read_of_it_or_was_to_be_reused(any_ex, held):
    text = draw_ids(4, 400, any_ex)
    engine = make(any_ex)
    if held:  # then a chunk of 64 is too much for the first turn, after the one of a short prompt
        answer(engine, sampled(text[:held]))
        engine.submit(sampled([3]))
    given_up = engine.submit(sampled(text))
    engine.step()
    assert (given_up.reused, given_up.tokens) == (64 if held else 0, [])
    given_up.cancel()
    rest(engine)
    again = answer(engine, sampled(text))
    assert again.reused == SIZES[-1]
    assert_same(again, alone(any_ex, again.request))


def test_a_prompt_to_be_scored_is_read_anew(any_ex):
    """And reused where reading it for its scores does not change its bits."""
    unit, invariant = any_ex.plan.reuse_multiple, any_ex.plan.batch_invariant
    text = draw_ids(5, unit + 40, any_ex)
    engine = make(any_ex)
    answer(engine, sampled(text))
    scored = answer(engine, sampled(text, prompt_logprobs=True))
    assert scored.reused == 0
    assert len(scored.result.prompt_logprobs) == len(text)
    assert_same(scored, alone(any_ex, scored.request))
    engine = make(any_ex)
    answer(engine, sampled(text, prompt_logprobs=True))
    again = answer(engine, sampled(text))
    assert again.reused == (len(text) // unit * unit if invariant else 0)
    assert_same(again, alone(any_ex, again.request))


def test_without_reuse_nothing_is_reused(ex, monkeypatch):
    engine = make(ex, reuse=False)
    copies = spy(monkeypatch, ex, "copy_slot")
    generations = [engine.submit(sampled(list(range(3, 90)))) for _ in range(6)]
    rest(engine)
    assert [generation.reused for generation in generations] == [0] * 6
    assert copies == []
    assert engine.counts.cached_tokens == 0
    assert engine.counts.prompt_tokens == 6 * 87


# How the engine works changes no token.


@pytest.mark.parametrize("dispatches", [2, 3])
def test_running_ahead_changes_no_token(any_ex, dispatches, monkeypatch):
    """The next tokens are asked for before the last are read, past EOS and stop strings too."""
    rng, earlier = random.Random(1), []
    requests = [draw_request(rng, earlier) for _ in range(24)]
    ahead = changed(any_ex, max_in_flight=dispatches)
    engine, flying = make(ahead), []
    pipeline = engine._scheduler.pipeline
    receive = pipeline.receive

    def noted():
        flying.append(len(pipeline._in_flight))
        return receive()

    monkeypatch.setattr(pipeline, "receive", noted)
    generations = [engine.submit(request) for request in requests]
    rest(engine)
    assert max(flying) == dispatches
    for generation in generations:
        assert_same(generation, alone(any_ex, generation.request))


def test_no_request_compiles_anything_after_warm_up(any_ex):
    """Not by the executor, and not in passing: an array's operation outside a program is one."""
    rng, earlier, lowered = random.Random(3), [], []
    for size in SIZES:
        any_ex.compile(Score(size))  # these are compiled when first called
    engine = make(any_ex)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: lowered.append(event) if "jaxpr_to_mlir" in event else None
    )
    try:
        for _ in range(50):
            generation = engine.submit(draw_request(rng, earlier))
            engine.step()
            if rng.random() < 0.1:
                generation.cancel()
        rest(engine)
    finally:
        jax.monitoring.clear_event_listeners()
    assert lowered == []
    _, warm = warm_executor(any_ex.plan)
    apart = ("logits(", "score(")
    later = {name for name in any_ex.compiled.names if not name.startswith(apart)} - warm
    assert later - {"init_cache"} - {name for name in later if ", 3, " in name} == set()


def test_a_long_prompt_does_not_hold_up_the_answers_under_way(ex):
    slow = changed(ex, prefill_sizes=(16,))
    engine = make(slow)
    running = [engine.submit(endless(i, max_tokens=400)) for i in range(2)]
    while not all(generation.tokens for generation in running):
        engine.step()
    reader = engine.submit(sampled(draw_ids(0, 320, ex)))
    turns = 0
    while not reader.tokens:
        before = [len(generation.tokens) for generation in running]
        engine.step()
        turns += 1
        grown = [len(g.tokens) - n for g, n in zip(running, before, strict=True)]
        assert grown == [ex.plan.decode_steps] * 2
    assert turns == 320 / 16
    rest(engine)
    for generation in (*running, reader):
        assert_same(generation, alone(slow, generation.request))


def test_a_turn_reads_as_many_short_prompts_as_a_long_chunk_has_room_for(ex):
    engine = make(ex)
    short = [make_request(prompt_tokens=[3 + i], seed=i, ignore_eos=True) for i in range(6)]
    generations = [engine.submit(request) for request in short]
    engine.step()
    began = [bool(generation.tokens) for generation in generations]
    assert began == [True] * (SIZES[-1] // SIZES[0]) + [False] * 2
    rest(engine)


# The queue and the slots.


def test_of_equal_prompts_the_first_comes_first(ex, monkeypatch):
    began, begin = [], Generation.begin

    def noted(self, reused):
        began.append(self)
        begin(self, reused)

    monkeypatch.setattr(Generation, "begin", noted)
    engine = make(ex)
    prompts = [draw_ids(i, 20, ex) for i in range(20)]
    generations = [engine.submit(sampled(p, max_tokens=len(p) % 5 + 1)) for p in prompts]
    generations[9].cancel()
    rest(engine)
    assert began == [generation for generation in generations if not generation.cancelled]


def test_a_full_queue_refuses_until_there_is_room(ex):
    engine = make(ex, max_queue=2)
    generations = [engine.submit(endless(i)) for i in range(SLOTS + 2)]
    for _ in range(2):
        with pytest.raises(QueueFullError, match="requests wait already; try again later"):
            engine.submit(endless())
        engine.step()
    assert (engine.running, engine.queued) == (SLOTS, 2)
    generations[0].cancel()
    generations[-1].cancel()
    engine.step()
    assert (engine.running, engine.queued) == (SLOTS, 0)
    generations += [engine.submit(endless(i)) for i in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.submit(endless())
    rest(engine)
    assert all(generation.done for generation in generations)
    answer(engine, endless())


@pytest.mark.parametrize(("length", "limit"), [(1, 256), (256, 256), (257, 255), (511, 1)])
def test_max_tokens_that_nobody_gave_is_what_the_context_has_left(ex, length, limit):
    assert ex.context == 512
    prompt = draw_ids(length, length, ex)
    request = make_request(prompt_tokens=prompt, ignore_eos=True, seed=1)
    result = answer(make(ex), request).result
    assert len(result.tokens) == result.parameters.max_tokens == limit
    with pytest.raises(ContextError, match=f"max_tokens is {513 - length}, but"):
        make(ex).submit(make_request(prompt_tokens=prompt, max_tokens=513 - length))


@pytest.mark.parametrize("length", [512, 513])
def test_a_prompt_that_leaves_no_room_is_refused(ex, length):
    with pytest.raises(ContextError) as error:
        make(ex).submit(make_request(prompt_tokens=[3] * length))
    assert str(error.value) == (
        f"prompt has {length} tokens, but the context holds 512; shorten the prompt"
    )
    scored = make_request(prompt_tokens=[3] * 512, max_tokens=0)
    assert answer(make(ex), scored).tokens == []


def test_no_tokens_are_no_work(ex):
    engine = make(ex)
    generation = engine.submit(question(max_tokens=0))
    assert not engine.step()
    assert generation.done
    assert (generation.result.tokens, generation.result.finish_reason) == ([], "length")
    assert generation.result.response == ""
    assert engine._scheduler.pipeline._state is None


@pytest.mark.parametrize("where", ["queue", "prompt", "answer"])
def test_a_cancelled_request_ends_wherever_it_is(ex, where):
    engine = make(ex)
    count = SLOTS if where == "queue" else 1
    others = [engine.submit(endless(i, max_tokens=200)) for i in range(count)]
    prompt = draw_ids(0, 400, ex)
    request = sampled(prompt, max_tokens=100)
    generation = engine.submit(request)
    engine.step()
    while where == "answer" and not generation.tokens:
        engine.step()
    assert bool(generation.tokens) == (where == "answer")
    assert not generation.done
    generation.cancel()
    engine.step()
    assert generation.done
    assert engine.queued == 0
    assert engine.running == len(others)
    assert generation.result.finish_reason == "cancelled"
    assert generation.result.timings.queue_s > 0
    assert generation.tokens == alone(ex, request).tokens[: len(generation.tokens)]
    assert generation.result.response == read(generation)[0]
    rest(engine)
    for other in others:
        assert_same(other, alone(ex, other.request))


ENDINGS = {
    "eos": {},
    "limit": {"ignore_eos": True, "max_tokens": 30},
    "stop string": {"stop": " is"},
    "cancel": {"ignore_eos": True},
    "error": {"ignore_eos": True},
}


@pytest.mark.parametrize("dispatches", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_slot_is_free_however_its_answer_ends(ex, ending, dispatches, monkeypatch):
    """For the engine and in the state: what is no one's draws nothing."""
    engine = make(changed(ex, max_in_flight=dispatches))
    prompt = "What is the capital of France?"
    request = make_request(prompt=prompt, temperature=0, **{"max_tokens": 200} | ENDINGS[ending])
    generation = engine.submit(request)
    while not generation.tokens:
        engine.step()
    if ending == "cancel":
        generation.cancel()
    if ending == "error":
        monkeypatch.setattr(generation, "push", None)
    rest(engine)
    assert generation.done
    assert list(engine.counts.ended) == [
        {"eos": "stop", "limit": "length", "stop string": "stop", "cancel": "cancelled"}.get(
            ending, "error"
        )
    ]
    assert_no_slot_is_lost(engine)


def assert_no_slot_is_lost(engine):
    """All draw nothing now, and all can be in use at once."""
    assert np.asarray(engine._scheduler.pipeline._state.done).all()
    generations = [engine.submit(endless(i, max_tokens=120)) for i in range(SLOTS)]
    for _ in range(SLOTS):
        engine.step()
    assert (engine.running, engine.queued) == (SLOTS, 0)
    rest(engine)
    for generation in generations:
        assert_same(generation, alone(engine.executor, generation.request))


OPERATIONS = ["submit"] * 4 + ["step"] * 4
OPERATIONS += ["cancel", "too long", "scored", "long", "break", "stop"]


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 3))]
)
def test_after_any_200_operations_no_slot_and_no_request_is_lost(ex, seed):
    rng = random.Random(seed)
    engine, generations, refused = make(ex, max_queue=9), [], 0
    changes = {
        "submit": {},
        "scored": {"prompt_logprobs": True, "max_tokens": 0},
        "long": {"prompt": "Tell me more. " * 60, "raw": True},
        "stop": {"stop": "e"},
        "too long": {"max_tokens": 512},
    }
    for operation in rng.choices(OPERATIONS, k=200):
        if operation == "step":
            engine.step()
        elif operation == "cancel" and generations:
            rng.choice(generations).cancel()
        elif operation == "break" and generations:
            rng.choice(generations).push = None
        elif operation in changes:
            i = rng.randrange(50)
            parameters = {"max_tokens": rng.randrange(1, 40), **changes[operation]}
            try:
                generations.append(engine.submit(question(i, **parameters)))
            except (QueueFullError, ContextError):
                refused += 1
        assert engine.queued <= 9 + SLOTS
        assert engine.running <= SLOTS
    assert refused > 5
    rest(engine)
    endings = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    for generation in generations:
        assert generation.done
        assert (generation.error is None) == (generation.result is not None)
        result = generation.result
        endings[result.finish_reason if result else "error"] += 1
    assert all(endings.values())
    assert engine.counts.ended == endings
    assert_no_slot_is_lost(engine)


# What fails, and whom it harms.


def raise_once(monkeypatch, owner, name, error, at=1):
    """Let a method raise at one of its calls."""
    method, calls = getattr(owner, name), itertools.count(1)

    def flaky(*args, **kwargs):
        if next(calls) == at:
            raise error
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, flaky)


@pytest.mark.parametrize("at", ["text", "answer", "end", "queue", "cancel"])
def test_a_request_whose_text_or_reader_fails_is_ended_alone(ex, at, monkeypatch):
    """A reader such as a server's event loop that is closed."""

    def tell():
        if (broken.done and at != "text") or at == "answer":
            raise RuntimeError("the loop is closed")

    engine = make(ex)
    others = [engine.submit(endless(i)) for i in range(SLOTS if at == "queue" else 2)]
    broken = engine.submit(endless(5), on_change=tell)
    if at == "text":
        raise_once(monkeypatch, broken, "push", RuntimeError("the loop is closed"), at=5)
    engine.step()
    if at in ("queue", "cancel"):
        broken.cancel()
    others.append(engine.submit(endless(6)))
    rest(engine)
    assert broken.done
    assert str(broken.error) == "the loop is closed"
    assert at != "text" or (len(broken.tokens), broken.result) == (4, None)
    assert engine.counts.ended == {"error": 1, "length": len(others)}
    for other in others:
        assert_same(other, alone(ex, other.request))


class Lost:
    """An array that cannot be read: what a device's failure is like while it works."""

    def __array__(self, *_, **__):
        raise RuntimeError("the device is gone")


CALLS = ["init_state", "admit", "copy_slot", "release", "prefill_chunk", "decode"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("call", [*CALLS, "read"])
def test_a_failure_of_the_device_ends_those_in_slots_and_no_other(ex, call, error, monkeypatch):
    """An interrupt too, which besides goes on to whoever pressed the keys."""
    engine = make(ex)
    prompt = TOKENIZER.encode("Tell me a story. " * 20)
    changes = [{}, {"stop": "e"}, {"prompt_logprobs": True}, {}]
    requests = [sampled([*prompt, i], seed=i, **change) for i, change in enumerate(changes * 2)]
    generations = [engine.submit(request) for request in requests]
    if call == "read":
        decode = ex.decode

        def lose_once(*args):
            monkeypatch.setattr(ex, "decode", decode)
            state, drawn, rows = decode(*args)
            if isinstance(error, KeyboardInterrupt):
                monkeypatch.setattr(Lost, "__array__", error_raiser(error))
            return state, drawn._replace(tokens=Lost()), rows

        monkeypatch.setattr(ex, "decode", lose_once)
    else:
        raise_once(monkeypatch, ex, call, error)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            rest(engine)
    rest(engine)
    failed = [generation for generation in generations if generation.error is not None]
    assert 1 <= len(failed) <= SLOTS
    assert all(generation.result is None for generation in failed)
    assert engine.counts.ended["error"] == len(failed)
    for generation in generations:
        assert generation.done
        if generation not in failed:
            assert_same(generation, alone(ex, generation.request))


def error_raiser(error):
    def fail(*_, **__):
        raise error

    return fail


def test_an_interrupt_as_a_request_gets_its_slot_ends_it_once(ex):
    engine = make(ex)

    class Interrupted(Queue):
        calls = 0

        def take(self, generation):
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            super().take(generation)

    engine._queue = engine._waiting._live = Interrupted()
    first, second = (engine.submit(endless(i, max_tokens=9)) for i in range(2))
    with pytest.raises(KeyboardInterrupt):
        rest(engine)
    assert (engine.running, engine.queued) == (0, 1)
    assert type(first.error) is KeyboardInterrupt
    rest(engine)
    assert_same(second, alone(ex, second.request))
    assert engine.counts.ended == {"error": 1, "length": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_end_their_request_and_leave_no_trace(any_ex, value):
    """The token 7 has such an embedding; the other requests, and the slot's next, do not see it."""
    broken = copy.copy(any_ex)
    embed = any_ex.params["embed"]
    broken.params = any_ex.params | {"embed": embed.at[7].set(value)}
    engine, others = make(broken), [endless(i) for i in range(SLOTS - 1)]
    running = [engine.submit(request) for request in others]
    bad = engine.submit(sampled([5, *[7] * 90]))  # longer than the next one's prompt
    rest(engine)
    with pytest.raises(NotFiniteError, match=f"^{re.escape(str(bad.error))}$"):
        bad.raise_error()  # a copy of it
    assert "logits of output token 0 have a NaN or an infinity" in str(bad.error)
    assert bad.tokens == []
    assert engine.counts.ended["error"] == 1
    good = [engine.submit(sampled([5, 9 + i])) for i in range(SLOTS)]
    rest(engine)
    for generation in [*running, *good]:
        assert_same(generation, alone(broken, generation.request))


# Threads.


def test_no_more_are_taken_in_than_there_is_room_for(ex, monkeypatch):
    engine, has_room = make(ex, max_queue=3), Engine.has_room

    def slow(self, client):
        room = has_room(self, client)
        time.sleep(0.005)  # for others to ask the same
        return room

    monkeypatch.setattr(Engine, "has_room", slow)

    def submit(i):
        with contextlib.suppress(QueueFullError):
            return engine.submit(endless(i, max_tokens=2))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        taken = [g for g in pool.map(submit, range(32)) if g is not None]
    assert len(taken) == engine.queued == SLOTS + 3
    rest(engine)


def test_a_reader_makes_no_turn_once_another_has_drawn_its_piece(llm, monkeypatch):
    stream, lock, asked = llm.start(endless()), llm.engine._turn_lock, threading.Event()

    class Watched:
        def __enter__(self):
            asked.set()
            return lock.__enter__()

        def __exit__(self, *error):
            return lock.__exit__(*error)

    monkeypatch.setattr(llm.engine, "_turn_lock", Watched())
    turn = error_raiser(SystemExit("a turn that is not needed"))
    monkeypatch.setattr(llm.engine._scheduler, "turn", turn)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with lock:
            reading = pool.submit(stream.next_piece)
            assert asked.wait(60)
            stream._generation._pieces.append(Piece("drawn meanwhile", [], []))
        assert reading.result(60).text == "drawn meanwhile"


def test_threads_that_generate_at_once_are_answered_as_if_alone(llm, ex):
    requests = [endless(i, max_tokens=20 + i) for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda request: collect(llm.start(request)), requests))
    for request, result in zip(requests, results, strict=True):
        assert result.tokens == alone(ex, request).tokens


def collect(stream):
    assert "".join(stream) == stream.result.response
    return stream.result


def test_run_notices_being_stopped_at_any_moment(ex):
    """Here right after it looked, when it is about to go to sleep."""
    engine = make(ex)

    class Late(threading.Event):
        def is_set(self):
            was = super().is_set()
            self.set()
            engine.wake()
            return was

    runner = threading.Thread(target=engine.run, args=[Late()], daemon=True)
    runner.start()
    runner.join(10)
    assert not runner.is_alive()


# Streams.


def test_interleaved_streams_are_each_as_alone(llm, ex):
    requests = [endless(i, max_tokens=30 + 5 * i, logprobs=[None, 2][i % 2]) for i in range(7)]
    streams = [llm.start(request) for request in requests]
    rng, texts, tokens = random.Random(0), [""] * 7, [[] for _ in range(7)]
    going = list(range(7))
    while going:
        i = rng.choice(going)
        piece = streams[i].next_piece()
        if piece is None:
            going.remove(i)
            continue
        texts[i] += piece.text
        tokens[i] += piece.tokens
        assert [each.token for each in piece.logprobs] == (piece.tokens if i % 2 else [])
    for stream, text, ids, request in zip(streams, texts, tokens, requests, strict=True):
        expected = alone(ex, request).result
        assert (text, ids) == (expected.response, expected.tokens)
        assert stream.result.tokens == ids
        assert stream.result.timings.load_s == llm.load_s


def test_a_stream_let_go_frees_its_slot(llm):
    streams = [llm.start(endless(i, max_tokens=400)) for i in range(SLOTS)]
    assert all(next(stream) for stream in streams)
    assert llm.engine.running == SLOTS
    last = streams.pop()
    streams.clear()
    assert llm.generate(prompt="Hi", seed=1).tokens
    assert llm.engine.running == 1
    last.close()
    assert "".join(last)  # what was drawn before can be read
    assert last.result.finish_reason == "cancelled"
    assert llm.engine.running == 0


def test_a_stream_that_fails_says_so(llm, monkeypatch):
    generation = llm.engine.submit(endless())
    raise_once(monkeypatch, generation, "push", ValueError("no such piece"), at=12)
    stream, errors = Stream(llm.engine, generation), []
    for _ in range(2):  # each reader gets an error of its own
        with pytest.raises(ValueError, match="no such piece") as raised:
            list(stream)
        errors.append(raised.value)
    assert len(set(map(id, [*errors, generation.error]))) == 3
    assert len(generation.tokens) == 11
    assert not generation.unread  # what came before was given out
    with pytest.raises(RuntimeError, match="the stream failed: it has no result") as caught:
        _ = stream.result
    assert caught.value.__cause__ is generation.error
    assert llm.generate(prompt="Hi", seed=1).tokens


def test_generate_all_yields_in_order_as_if_alone(llm, ex):
    requests = [endless(i, max_tokens=1 + 7 * (i % 5)) for i in range(20)]
    taken = []

    def arriving():
        for request in requests:
            taken.append(request)
            yield {"messages": request.messages} | {**request.parameters}

    results = llm.generate_all(arriving())
    first = next(results)
    assert len(taken) <= 2 * SLOTS  # none is asked for before there is need
    for request, result in zip(requests, [first, *results], strict=True):
        assert result.tokens == alone(ex, request).tokens
        assert result.seed == request.parameters.seed


@pytest.mark.parametrize("max_queue", [0, None])
def test_generate_all_gets_on_though_others_hold_all_the_room(llm, max_queue):
    llm.engine.max_queue = max_queue
    count = SLOTS if max_queue == 0 else 4 * SLOTS
    others = [llm.start(endless(i)) for i in range(count)]
    results = []
    worker = threading.Thread(
        target=lambda: results.extend(llm.generate_all([{"prompt": "Hi", "seed": 1}] * 3)),
        daemon=True,
    )
    worker.start()
    worker.join(60)
    assert [result.finish_reason for result in results] == ["stop"] * 3
    assert all(other.done for other in others[:SLOTS])


@pytest.mark.parametrize("at", [1, 2, 8, 20])
def test_generate_all_comes_again_if_another_thread_was_faster(llm, monkeypatch, at):
    requests = [{"prompt": "Hi", "seed": seed, "max_tokens": 9} for seed in range(1, 21)]
    expected = [llm.generate(**request).tokens for request in requests]
    raise_once(monkeypatch, llm.engine, "submit", QueueFullError("try again"), at=at)
    assert [result.tokens for result in llm.generate_all(requests)] == expected


# Logprobs.


def assert_reported(reported, tokens, logprobs, count):
    """The log-probabilities reported of tokens are the rows of these."""
    assert [each.token for each in reported] == tokens
    for each, row in zip(reported, logprobs, strict=True):
        assert abs(each.logprob - row[each.token]) < 1e-4
        ids, values = [i for i, _ in each.top], [value for _, value in each.top]
        assert len(set(ids)) == count
        np.testing.assert_allclose(values, row[ids], atol=1e-4)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:count], atol=1e-4)


@pytest.mark.parametrize("count", [0, 5, 20])
def test_logprobs_are_those_of_the_models_own_logits(llm, ex, count):
    """Whatever the parameters, among neighbours, and across the chunks of a long prompt."""
    prompt = draw_ids(7, 300, ex)
    request = make_request(
        prompt_tokens=prompt,
        seed=3,
        max_tokens=20,
        ignore_eos=True,
        temperature=1.5,
        top_k=50,
        repetition_penalty=1.5,
        frequency_penalty=1,
        logprobs=count,
        prompt_logprobs=True,
    )
    others = [llm.start(endless(i)) for i in range(3)]
    stream = llm.start(request)
    pieces = list(iter(stream.next_piece, None))
    result = stream.result
    logprobs = log_softmax(llm.logits(prompt + result.tokens), axis=-1)
    assert_reported(result.logprobs, result.tokens, logprobs[299:-1], count)
    assert result.prompt_logprobs[0] is None
    assert_reported(result.prompt_logprobs[1:], prompt[1:], logprobs[:299], count)
    assert [each for piece in pieces for each in piece.logprobs] == result.logprobs
    whole = alone(ex, request)
    assert_same(whole, stream._generation)
    del others


def test_a_prompt_may_be_scored_alone(llm, ex):
    prompt = draw_ids(8, 290, ex)
    result = llm.generate(prompt_tokens=prompt, max_tokens=0, prompt_logprobs=True, logprobs=1)
    assert (result.tokens, result.logprobs, result.finish_reason) == ([], [], "length")
    logprobs = log_softmax(llm.logits(prompt), axis=-1)
    assert_reported(result.prompt_logprobs[1:], prompt[1:], logprobs[:-1], 1)


def test_scores_change_no_token(native_kernels):
    """With kernels; elsewhere reading a prompt for its scores may round otherwise."""
    ex = warm_executor(PLANS["native"])[0]
    plain = sampled(draw_ids(9, 100, ex), max_tokens=40, logprobs=None)
    expected = alone(ex, plain).tokens
    for fields in ({"logprobs": 3}, {"prompt_logprobs": True}, {"logprobs": 0}):
        parameters = dataclasses.replace(plain.parameters, **fields)
        assert alone(ex, dataclasses.replace(plain, parameters=parameters)).tokens == expected


def test_threads_use_the_engine_in_the_order_of_their_calls(llm, ex, monkeypatch):
    """Whoever has just released it waits behind those that came meanwhile, for logits too."""
    engine, order = llm.engine, []
    monkeypatch.setattr(engine._scheduler, "turn", lambda: bool(order.append("turn")))
    monkeypatch.setattr(ex, "logits", lambda tokens: order.append("logits"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with engine._turn_lock:
            for waiting, call in enumerate((engine.step, lambda: llm.logits([1])), start=1):
                pool.submit(call)
                while len(engine._turn_lock._waiting) < waiting:
                    time.sleep(0.001)
        with engine._turn_lock:
            order.append("again")
    assert order == ["turn", "logits", "again"]


def test_a_lock_that_an_interrupt_finds_waiting_is_passed_on(monkeypatch):
    lock, waiting = FairLock(), []

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            waiting.append(self)
            raise KeyboardInterrupt

    with lock, monkeypatch.context() as patch:
        patch.setattr("llama_jax.engine.fair_lock.threading.Event", Interrupted)
        with pytest.raises(KeyboardInterrupt), lock:
            pass
    assert waiting
    assert not lock.locked()
    with lock:
        assert lock.locked()


def test_a_failed_step_keeps_nothing_of_the_decode_state_alive(ex, monkeypatch):
    """Its error lives as long as the request's reader, but not the state that its frames held."""
    engine = make(ex)
    generation = engine.submit(endless())
    engine.step()
    kept = weakref.ref(engine._scheduler.pipeline._state.cache[0].k)

    def fail(state, slots, longest):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(ex, "decode", fail)
    engine.step()
    assert generation.error is not None
    gc.collect()
    assert kept() is None


def test_run_gives_up_when_the_device_fails_every_turn(ex, monkeypatch):
    engine = make(ex)
    monkeypatch.setattr(ex, "decode", error_raiser(RuntimeError("the device is gone")))
    generations = [engine.submit(endless(i)) for i in range(MAX_FAILURES * SLOTS + 1)]
    with pytest.raises(EngineFailedError, match=f"failed {MAX_FAILURES} times"):
        engine.run(threading.Event())
    assert all(generation.done for generation in generations), "nobody waits for ever"
    with pytest.raises(EngineFailedError):
        engine.submit(endless())


def test_a_failure_between_results_is_no_failure_of_the_device(ex, monkeypatch):
    engine, stopping = make(ex), threading.Event()
    for i in range(MAX_FAILURES + 1):
        raise_once(monkeypatch, ex, "decode", RuntimeError("for once"))
        engine.submit(endless(i, max_tokens=20))
        rest(engine)
        answer(engine, endless(i, max_tokens=20))
    stopping.set()
    engine.run(stopping)


@pytest.mark.slow
def test_warm_up_and_a_request_compile_each_program_once():
    plan = choose_plan(CONFIG, "float32")._replace(prefill_sizes=(32,))
    ex = Executor(CONFIG, random_params(CONFIG), "float32", context=256, plan=plan)
    engine = Engine(ex, None)
    generation = engine.submit(make_request(prompt_tokens=[3] * 20, max_tokens=20, seed=1))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        warming = pool.submit(lambda: list(engine.warm_up()))
        rest(engine)
        progress = warming.result()
    assert progress[-1][0] == progress[-1][1] == len(progress)
    assert len(ex.compiled.names) == len(set(ex.compiled.names))
    timings = generation.result.timings
    assert min(timings.prefill_s, timings.decode_s, timings.compile_s) >= 0


@pytest.mark.slow
def test_programs_for_fewer_needs_are_compiled_beside_the_turns(monkeypatch, caplog):
    """Each once, in no request's time; one that cannot be compiled is left out."""
    plan = choose_plan(CONFIG, "float32")._replace(prefill_sizes=(32,))
    ex = Executor(CONFIG, random_params(CONFIG), "float32", context=256, plan=plan)
    engine = Engine(ex, None)
    warm = {str(program) for program in serving_programs(ex.sizes)}
    assert len(list(engine.warm_up())) == len(warm)
    assert set(ex.compiled.names) == warm
    requests = [
        make_request(prompt_tokens=[3] * 20, max_tokens=20, seed=1, **parameters)
        for parameters in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_k": 5})
    ]
    tokens = [answer(engine, request).tokens for request in requests for _ in range(2)]
    assert set(ex.compiled.names) == warm

    compile_program, waited_s = ex.compile, ex.compiled.waited_s

    def compile_most(program):
        if program == FirstToken(Needs()):
            raise RuntimeError("no room for it")
        compile_program(program)

    monkeypatch.setattr(ex, "compile", compile_most)
    stopping = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(engine.compile_wanted, stopping)
        wait_until(ex.programs.wanted.empty)
        wait_until(lambda: len(ex.compiled.names) == len(warm) + 5)
        stopping.set()
        engine.wake()
        compiling.result(60)
    assert "first_token() is not compiled" in caplog.text
    later = set(ex.compiled.names) - warm
    assert {name.split("(")[0] for name in later} == {"first_token", "decode"}
    assert len(later) == 5
    assert ex.compiled.waited_s == waited_s
    again = [answer(engine, request) for request in requests for _ in range(2)]
    assert [generation.tokens for generation in again] == tokens
    assert {generation.result.timings.compile_s for generation in again} == {0.0}
    assert set(ex.compiled.names) == warm | later


def test_who_compiles_beside_the_turns_stops_after_the_program_in_hand(monkeypatch):
    plan = choose_plan(CONFIG, "float32")._replace(prefill_sizes=(32,))
    ex = Executor(CONFIG, random_params(CONFIG), "float32", context=256, plan=plan)
    engine, stopping, compiled = Engine(ex, None), threading.Event(), []

    def compile_program(program):
        compiled.append(program)
        stopping.set()
        engine.wake()

    monkeypatch.setattr(ex, "compile", compile_program)
    for needs in (Needs(), Needs(noise=True)):
        ex.programs.wanted.put(FirstToken(needs))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(engine.compile_wanted, stopping).result(60)
    assert compiled == [FirstToken(Needs())]
