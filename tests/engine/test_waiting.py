"""Background work: it has the slots that live requests leave, and loses nothing but time."""

import copy

import pytest

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import make_request
from llama_jax.engine.waiting import MAX_PREEMPTIONS
from tests.helpers.demo import load_demo
from tests.helpers.engines import rest

SLOTS = 2


@pytest.fixture(params=[1, 3], ids="{} in flight".format)
def engine(request):
    """One that reads results at once, and one that runs ahead as on an accelerator."""
    llm = load_demo(slots=SLOTS)
    executor = copy.copy(llm.executor)
    executor.plan = executor.plan._replace(max_in_flight=request.param)
    return Engine(executor, llm.tokenizer)


def request(seed, **parameters):
    fields = {"prompt": f"Tell me tale {seed}.", "seed": seed, "temperature": 1.0}
    return make_request(**{**fields, "ignore_eos": True, "max_tokens": 40, **parameters})


def alone(seed, **parameters):
    engine = load_demo(slots=SLOTS).engine
    generation = engine.submit(request(seed, **parameters))
    rest(engine)
    return generation.result


def run_until(engine, condition):
    for _ in range(500):
        if condition():
            return
        engine.step()
    raise AssertionError("it has not come to be")


def test_live_requests_take_the_slots_of_background_work_at_once(engine):
    work = [engine.submit(request(i), background=True) for i in range(3)]
    run_until(engine, lambda: all(each.tokens for each in work[:2]))
    assert (engine.running, engine.queued, engine.background) == (0, 0, (2, 1))
    held = [list(each.tokens) for each in work]
    live = [engine.submit(request(10 + i, max_tokens=20)) for i in range(2)]
    engine.step()
    assert (engine.running, engine.background) == (2, (0, 3))
    run_until(engine, lambda: all(each.done for each in live))
    for each, before in zip(work, held, strict=True):
        assert not each.done
        assert each.tokens[: len(before)] == before
    rest(engine)
    for i, each in enumerate(work):
        assert each.result.tokens == alone(i).tokens
    for i, each in enumerate(live):
        assert each.result.tokens == alone(10 + i, max_tokens=20).tokens
    assert engine.counts.prompt_tokens == sum(len(each.prompt) for each in [*work, *live])


def test_background_work_that_gives_up_its_slot_again_and_again_goes_on_with_the_same_tokens(
    engine,
):
    """With log-probabilities and a stop text, whose state is kept too."""
    parameters = {"logprobs": 2, "stop": ["zzz"], "repetition_penalty": 1.3}
    work = engine.submit(request(1, **parameters), background=True)
    others = engine.submit(request(2), background=True)
    for i in range(60):
        engine.submit(request(100 + i, max_tokens=1))
        engine.submit(request(300 + i, max_tokens=2))
        for _ in range(4):
            engine.step()
        if work.done and others.done:
            break
    rest(engine)
    expected = alone(1, **parameters)
    assert work.result.tokens == expected.tokens
    assert work.result.response == expected.response
    assert [each.token for each in work.result.logprobs] == expected.tokens
    assert others.result.tokens == alone(2).tokens


def test_work_whose_prompt_is_never_read_whole_keeps_its_slot_in_the_end(engine):
    """Live requests come each time before its long prompt is read."""
    long = "word " * 300
    work = [engine.submit(request(i, prompt=f"{i} {long}"), background=True) for i in range(2)]
    lost = 0
    for i in range(200):
        if all(each.tokens for each in work):
            break
        if all(each.done for each in work):
            break
        live = [engine.submit(request(1000 + 2 * i + j, max_tokens=1)) for j in range(2)]
        run_until(engine, lambda live=live: all(each.done for each in live))
        engine.step()
        lost = max([lost, *(each.preemptions for each in work)])
    assert any(each.tokens for each in work)
    assert lost == MAX_PREEMPTIONS
    rest(engine)
    assert [each.result.tokens for each in work] == [
        alone(i, prompt=f"{i} {long}").tokens for i in range(2)
    ]


def test_a_prompt_that_is_scored_keeps_its_slot(engine):
    fields = {"logprobs": 1, "prompt_logprobs": True, "max_tokens": 8, "prompt": "word " * 200}
    work = engine.submit(request(1, **fields), background=True)
    engine.step()
    live = [engine.submit(request(10 + i, max_tokens=2)) for i in range(2)]
    rest(engine)
    assert all(each.result for each in live)
    assert len(work.result.prompt_logprobs) == len(work.prompt)
    assert work.result.tokens == alone(1, **fields).tokens


def test_a_full_queue_has_room_for_background_work_and_is_not_full_of_it(engine):
    engine.max_queue = 0
    work = [engine.submit(request(i, max_tokens=30), background=True) for i in range(8)]
    run_until(engine, lambda: engine.background[0] == SLOTS)
    live = [engine.submit(request(20 + i, max_tokens=4)) for i in range(SLOTS)]
    rest(engine)
    assert all(each.result for each in [*work, *live])


def test_background_work_can_be_cancelled_as_it_waits_and_as_it_runs(engine):
    work = [engine.submit(request(i), background=True) for i in range(3)]
    run_until(engine, lambda: engine.background == (2, 1))
    work[0].cancel()
    work[2].cancel()
    rest(engine)
    assert [each.result.finish_reason for each in work] == ["cancelled", "length", "cancelled"]
    assert work[1].result.tokens == alone(1).tokens
