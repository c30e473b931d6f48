"""How many steps a turn runs follows from time and changes no token; streams come evenly."""

import functools
import itertools
import random

import jax
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import accelerator_plan
from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.engine import clock as engine_clock
from llama_jax.engine.bursts import Bursts
from llama_jax.engine.clock import Clock
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import make_request
from llama_jax.engine.stream import Stream
from llama_jax.nn.kernel_choice import KernelChoice
from tests.helpers.drafting import EagerNgrams, mixed_requests
from tests.helpers.models import CONFIG, NATIVE, PURE, PURE_MARKS, random_params

SLOTS, STEPS, DRAFTS = 2, 8, 3
PLANS = {
    "native": NATIVE._replace(prefill_sizes=(16,)),
    "strict": PURE._replace(kernels=KernelChoice("plain", "rows", "plain", "blocks", 8)),
    "fast": PURE,
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("strict", marks=PURE_MARKS),
        pytest.param("fast", marks=PURE_MARKS),
        "native",
    ],
)
def plan(request):
    """Those that a CPU may have."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return PLANS[request.param]


@functools.cache
def executor(plan):
    params = random_params(CONFIG)
    ex = Executor(CONFIG, params, "float32", batch=SLOTS, context=600, plan=plan)
    list(ex.warm_up())  # these serve all needs; else each of them is compiled
    return ex


def make(plan, drafter=None):
    plan = plan.speculating(DRAFTS if drafter else 0)
    return Engine(executor(plan), None, drafter=drafter)


def rest(engine):
    for _ in range(10_000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to rest")


def drawn(engine, requests):
    """All that is returned of each request."""
    generations = [engine.submit(request) for request in requests]
    rest(engine)
    assert [generation.error for generation in generations] == [None] * len(requests)
    results = [generation.result for generation in generations]
    return [(r.tokens, r.finish_reason, r.logprobs, r.record.draws) for r in results]


def with_steps(engine, chosen):
    """The engine, the steps of whose turns are those chosen."""
    engine._scheduler._bursts.begin = lambda count, *, streamed: next(chosen)
    return engine


def across_buckets():
    """Answers that begin before the first bucket's end, and end after it."""
    rng = random.Random(5)
    prompts = [[rng.randrange(CONFIG.vocab_size) for _ in range(n)] for n in (239, 250, 255)]
    fixed = {"max_tokens": 40, "ignore_eos": True, "logprobs": 2, "temperature": 1.2, "top_p": 0.9}
    return [make_request(prompt_tokens=p, seed=i, **fixed) for i, p in enumerate(prompts)]


def test_any_numbers_of_steps_draw_the_same_bits(plan):
    requests = [*across_buckets(), *mixed_requests(14, CONFIG.vocab_size, seed=4)]
    expected = drawn(make(plan), requests)
    assert {reason for _, reason, *_ in expected} == {"stop", "length"}
    rng = random.Random(1)
    patterns = [
        itertools.repeat(1),
        itertools.cycle([1, 2, 4, 8]),
        (rng.randint(1, STEPS) for _ in itertools.count()),
    ]
    for chosen in patterns:
        assert drawn(with_steps(make(plan), chosen), requests) == expected


@pytest.mark.slow
def test_any_numbers_of_steps_between_drafts_draw_the_same_bits(native_kernels):
    plan = PLANS["native"]
    requests = mixed_requests(12, CONFIG.vocab_size, seed=8)
    expected, rng = drawn(make(plan), requests), random.Random(2)
    chosen = (rng.randint(1, STEPS) for _ in itertools.count())
    assert drawn(with_steps(make(plan, EagerNgrams()), chosen), requests) == expected


class FakeTime:
    """In place of the module `time` in `engine.clock`; decoding is what takes time."""

    def __init__(self, monkeypatch, engine, step_s, turn_s=0.0):
        self.now, self.steps = 0.0, []
        decode = engine.executor.decode

        def timed(state, slots, longest, needs, steps):
            self.now += turn_s + step_s * steps
            self.steps.append(steps)
            return decode(state, slots, longest, needs, steps)

        monkeypatch.setattr(engine_clock, "time", self)
        monkeypatch.setattr(engine.executor, "decode", timed)

    def perf_counter(self):
        return self.now


@pytest.fixture
def engine(native_kernels):
    return make(PLANS["native"])


def request(seed=0, max_tokens=60):
    fields = {"ignore_eos": True, "temperature": 1.0, "seed": seed, "max_tokens": max_tokens}
    return make_request(prompt_tokens=[5, 6, 7 + seed], **fields)


def test_a_lone_stream_gets_its_tokens_one_by_one(engine, monkeypatch):
    """Where a step takes 14 ms; the first comes before any step is run."""
    time = FakeTime(monkeypatch, engine, step_s=0.014, turn_s=0.0005)
    stream = Stream(engine, engine.submit(request(), streamed=True))
    ran = []
    while (piece := stream.next_piece()) is not None:
        assert len(piece.tokens) == 1
        ran.append(len(time.steps))
    assert ran == list(range(60))
    assert time.steps == [1] * 59


@pytest.mark.parametrize("turn_s", [0.0, 0.001])
@pytest.mark.parametrize("step_s", [0.00002, 0.001, 0.003, 0.009, 0.03, 0.3])
def test_a_burst_is_no_longer_than_50_ms_unless_one_token_is(engine, monkeypatch, step_s, turn_s):
    time = FakeTime(monkeypatch, engine, step_s, turn_s)
    for seed in range(2):
        engine.submit(request(seed, max_tokens=60 - 20 * seed), streamed=seed == 0)
    rest(engine)
    assert time.steps[0] == 1  # nothing is known yet
    assert all(steps == 1 or turn_s + step_s * steps <= 0.05 for steps in time.steps)
    # And no more turns than that takes: their own time is a tenth at most, or a step is long.
    usual = time.steps[len(time.steps) // 2]
    assert usual == STEPS or step_s * (usual + 1) + turn_s > 0.01


def test_what_nobody_reads_as_it_comes_is_decoded_by_the_longest_turns(engine, monkeypatch):
    time = FakeTime(monkeypatch, engine, step_s=0.05)
    engine.submit(request(0, max_tokens=41))
    rest(engine)
    assert time.steps == [STEPS] * 5
    read = engine.submit(request(1, max_tokens=5), streamed=True)
    engine.submit(request(2, max_tokens=41))
    while not read.done:
        engine.step()
    assert time.steps[5:] == [1] * 4
    rest(engine)
    assert time.steps[9:] == [STEPS] * 5


def test_times_of_a_turn_count_for_as_many_slots_and_steps(engine, monkeypatch):
    """One that ends early has run fewer steps; one slow turn decides nothing."""
    time = FakeTime(monkeypatch, engine, step_s=0.001)
    bursts = Bursts(engine.executor, clock := Clock(engine.executor.compiled))

    def turn(slots, ran, seconds):
        steps = bursts.begin(slots, streamed=True)
        time.now += seconds
        bursts.end(np.where(np.arange(STEPS)[:, None] < ran, 5, [NO_TOKEN] * slots))
        return steps

    clock.start()
    assert [turn(1, 1, 0.004) for _ in range(3)] == [1, 4, 4]
    assert [turn(2, 4, 0.032), turn(2, 4, 0.032)] == [1, 2]
    assert [turn(1, 2, 0.008), turn(1, 4, 9.0), turn(1, 4, 0.016)] == [4, 4, 4]


def test_several_processes_do_not_decide_by_time_on_their_own(engine, monkeypatch):
    clock = Clock(engine.executor.compiled)
    assert Bursts(engine.executor, clock).begin(1, streamed=True) == 1
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert Bursts(engine.executor, clock).begin(1, streamed=True) == STEPS
        patch.setattr(engine.executor, "lockstep", object())
        assert Bursts(engine.executor, clock).begin(1, streamed=True) == 1
    for plan, steps in (
        (PLANS["native"]._replace(max_in_flight=2), 8),
        (accelerator_plan("gpu", "bfloat16"), 16),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine.executor, "plan", plan)
            assert Bursts(engine.executor, clock).begin(1, streamed=True) == steps


def test_those_that_read_as_it_comes_say_so(monkeypatch):
    llm, said = Llama.load(slots=1), []
    submit = llm.engine.submit

    def noted(request, **options):
        said.append(options.get("streamed", False))
        return submit(request, **options)

    monkeypatch.setattr(llm.engine, "submit", noted)
    one = {"prompt": "Hi", "max_tokens": 1}
    llm.stream(**one)
    llm.generate(**one)
    list(llm.generate_all([one]))
    assert said == [True, False, False]
