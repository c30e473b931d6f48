"""Receipts of the server's answers: kept, found by their ids, asked for, and replayed."""

import asyncio
import dataclasses
import json
import re
import sys

import pytest
from jsonschema import Draft202012Validator

from llama_jax import InputError
from llama_jax.engine.clock import Clock
from llama_jax.engine.draw import Draw
from llama_jax.engine.environment import UNKNOWN, Environment
from llama_jax.engine.generation import Generation
from llama_jax.engine.request import make_request
from llama_jax.engine.result import TokenLogprob
from llama_jax.receipt.reading import read_receipts, read_statement
from llama_jax.replay.replay import replay
from llama_jax.server.answers import Answers
from llama_jax.server.errors import ApiError
from llama_jax.server.receipts import ReceiptStore, size_of
from llama_jax.server.request_log import RequestLog
from llama_jax.server.settings import Settings
from tests.helpers import signing
from tests.helpers.demo import load_demo
from tests.helpers.serving import (
    ANSWER,
    ASKING,
    CHAT,
    COMPLETIONS,
    MODEL,
    QUESTION,
    RUN,
    RawCall,
    events_of,
    make_app,
    paused,
    serving,
    wait_until,
)

UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
BODIES = {
    RUN: {"prompt": QUESTION, "seed": 7},
    CHAT: {"model": MODEL, "messages": [ASKING], "seed": 7},
    COMPLETIONS: {"model": MODEL, "prompt": [1, 5], "max_tokens": 9, "seed": 2**64 - 1},
}


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=4)


@pytest.fixture
def client(llm):
    with serving(llm, receipts=100) as client:
        yield client


def fetch(client, receipt_id):
    """Return a receipt that is kept, read."""
    response = client.get(f"/receipts/{receipt_id}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    receipt = read_statement(response.json(), "it")
    assert receipt.problems == []
    assert receipt.invocation == receipt_id
    return receipt


def text_of(body):
    """Return the text of a whole answer or of an event, of any route."""
    if "choices" in body:
        [choice] = body["choices"]
        message = choice.get("message") or choice.get("delta") or choice
        return message.get("text", message.get("content", ""))
    return body.get("result", body)["response"]


def verdicts(llm, *receipts):
    return [verdict.outcome.name for verdict in replay(llm, receipts)]


def refusal(client, receipt_id):
    """Return why there is no such receipt."""
    response = client.get(f"/receipts/{receipt_id}")
    assert response.status_code == 404
    [error] = response.json()["errors"]
    assert error["code"] == 7003
    assert repr(receipt_id) in error["message"]
    return error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_an_answer_s_receipt_is_found_by_its_id_and_proves_it(client, llm, path, stream):
    response = client.post(path, json=BODIES[path] | {"stream": stream})
    assert response.headers["x-receipt-id"] == response.headers["x-request-id"]
    assert re.fullmatch(UUID4, response.headers["x-receipt-id"])
    receipt = fetch(client, response.headers["x-receipt-id"])
    bodies = [event for event in events_of(response.text) if event != "[DONE]"] if stream else []
    assert receipt.text == "".join(map(text_of, bodies or [response.json()]))
    assert receipt.parameters.seed == BODIES[path]["seed"]
    assert verdicts(llm, receipt) == ["EXACT"]


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_has_a_receipt(client, llm, stream):
    body = {"model": MODEL, "prompt": ["x", "Once"], "n": 2, "seed": 5, "max_tokens": 6}
    response = client.post(COMPLETIONS, json=body | {"stream": stream})
    request_id, ids = (response.headers[name] for name in ("x-request-id", "x-receipt-id"))
    assert ids.split(",") == [request_id, *(f"{request_id}.{n}" for n in (1, 2, 3))]
    receipts = [fetch(client, receipt_id) for receipt_id in ids.split(",")]
    assert [receipt.parameters.seed for receipt in receipts] == [5, 6, 5, 6]
    assert [receipt.prompt["raw_prompt"] for receipt in receipts] == ["x", "x", "Once", "Once"]
    if not stream:
        texts = [choice["text"] for choice in response.json()["choices"]]
        assert [receipt.text for receipt in receipts] == texts
    assert verdicts(llm, *receipts) == ["EXACT"] * 4


@pytest.mark.parametrize("kept", [0, 9])
def test_native_result_has_its_receipt_if_asked(llm, kept):
    body, headers = BODIES[RUN], {"X-Receipt": "true"}
    with serving(llm, receipts=kept) as client:
        plain = client.post(RUN, json=body)
        assert client.post(RUN, json=body, headers={"x-receipt": "False"}).json() == plain.json()
        whole = client.post(RUN, json=body, headers=headers)
        streamed = client.post(RUN, json=body | {"stream": True}, headers=headers)
        *_, ending, _ = events_of(streamed.text)
        for response, result in ((whole, whole.json()["result"]), (streamed, ending)):
            statement = result.pop("receipt")
            assert result.keys() <= plain.json()["result"].keys()
            receipt = read_statement(statement, "it")
            assert receipt.invocation == response.headers["x-request-id"]
            assert receipt.text == ANSWER
            assert verdicts(llm, receipt) == ["EXACT"]
            assert ("x-receipt-id" in response.headers) == bool(kept)
            if kept:
                assert client.get(f"/receipts/{receipt.invocation}").json() == statement
            else:
                assert "start it with --receipts=N" in refusal(client, receipt.invocation)


def test_receipts_are_signed(llm, tmp_path):
    """Those that are kept, and those that come with the answer."""
    ours, theirs = (signing.Pair(tmp_path, name) for name in ("ours", "theirs"))
    with serving(llm, receipts=9, signer=ours.signer) as client:
        response = client.post(RUN, json=BODIES[RUN], headers={"x-receipt": "true"})
        kept = client.get(f"/receipts/{response.headers['x-receipt-id']}").json()
    assert response.json()["result"]["receipt"] == kept
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(kept))
    assert verdicts(llm, *read_receipts(path, ours.verifier)) == ["EXACT"]
    with pytest.raises(InputError, match=f"signed by another key: {ours.key_id}"):
        list(read_receipts(path, theirs.verifier))


def test_a_header_that_is_neither_true_nor_false_is_refused(client):
    response = client.post(RUN, json=BODIES[RUN], headers={"x-receipt": "1"})
    assert response.status_code == 400
    expected = "the header x-receipt is '1', expected true or false"
    assert expected in response.json()["errors"][0]["message"]
    assert "x-receipt-id" not in response.headers


# What is not here.


def test_the_oldest_receipt_is_dropped(llm):
    with serving(llm, receipts=2) as client:
        ids = [client.post(RUN, json=BODIES[RUN]).headers["x-receipt-id"] for _ in range(3)]
        for receipt_id in (ids[0], "nobody-s"):
            reason = refusal(client, receipt_id)
            assert "expected an x-receipt-id of one of the answers that ended last" in reason
            assert "(2 are here)" in reason
            assert "larger --receipts" in reason
        assert fetch(client, ids[1]).text == fetch(client, ids[2]).text == ANSWER


def run_of(llm, num_draws=40, **request):
    """Return a result that no model made."""
    generation = generation_of(llm, num_draws, **request)
    draw_all(generation)
    return generation.result


def draw_all(generation):
    """Let a generation end; its numbers are made up."""
    for number in range(generation.max_tokens):
        measures = [number + part / 8 for part in range(1, 6)]
        generation.push(Draw(300 + number, *measures), TokenLogprob(300 + number, -1.0, []))


def generation_of(llm, num_draws, **request):
    checked = make_request(**{"max_tokens": num_draws, **request})
    prompt = checked.encode(llm.tokenizer, llm.config.vocab_size)
    return Generation(
        checked, prompt, llm.tokenizer, clock=Clock(), environment=llm.engine.environment
    )


def test_receipts_fit_in_their_memory(llm):
    results = [run_of(llm, prompt=QUESTION, seed=seed, logprobs=1) for seed in (1, 2, 3)]
    store = ReceiptStore(9, max_bytes=sum(map(size_of, results)) - 1)
    for number, result in enumerate(results):
        store.expect(str(number))
        store.end(str(number), result)
    assert len(store) == 2
    assert store.held == sum(map(size_of, results[1:]))
    with pytest.raises(ApiError, match="No receipt '0' is here"):
        store.statement("0")
    assert store.statement("1") == results[1].receipt()
    assert all(result.logprobs is None for result, _ in store._kept.values())


def test_a_run_is_kept_once(llm):
    store, result = ReceiptStore(2), run_of(llm, prompt="x")
    store.end("never expected", result)
    for name in "abc":
        store.expect(name)
        store.end(name, result)
    store.end("a", result)  # dropped, and reported again
    store.expect("d")
    store.end("d", None)  # failed
    assert list(store._kept) == ["b", "c"]
    assert not store._under_way


def deep_size(value, seen):
    """Return the bytes of an object and all that it refers to, but for what all runs share."""
    if id(value) in seen or isinstance(value, Environment | type):
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        size += sum(deep_size(part, seen) for item in value.items() for part in item)
    elif isinstance(value, list | tuple):
        size += sum(deep_size(part, seen) for part in value)
    elif dataclasses.is_dataclass(value):
        size += deep_size(vars(value), seen)
    return size


def said(number):
    return {"role": "assistant" if number % 2 else "user", "content": f"message {number}"}


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": QUESTION},
        {"prompt": "x", "num_draws": 400},
        {"prompt_tokens": list(range(300, 700)), "num_draws": 1},
        {"prompt": "x", "num_draws": 1, "allowed_tokens": list(range(300, 700))},
        {"prompt": "x", "num_draws": 1, "logit_bias": {n: n / 9 for n in range(300, 700)}},
        {"prompt": "é😀" * 30, "num_draws": 1, "stop": ["y" * 9000]},
        {"messages": [said(n) for n in range(201)], "num_draws": 1},
    ],
    ids=["short", "answer", "prompt", "mask", "bias", "texts", "dialog"],
)
def test_the_size_of_a_run_is_about_what_it_takes(llm, request_):
    result = run_of(llm, **request_)
    assert 1 <= size_of(result) / deep_size(result, set()) < 2


def test_a_failed_answer_has_no_receipt(llm, client, monkeypatch):
    def broken(*args, **options):
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(llm.executor, "decode", broken)
        response = client.post(RUN, json={"prompt": "x"})
    assert response.status_code == 500
    assert "x-receipt-id" not in response.headers
    assert "(0 are here)" in refusal(client, response.headers["x-request-id"])
    assert not client.app.state.service.receipts._under_way


def test_a_refused_request_has_no_receipt(llm, client, monkeypatch):
    """All of its generations or none: those that had a place in the queue end as cancelled."""
    monkeypatch.setattr(llm.engine, "max_queue", 0)
    with paused(llm):
        body = {"model": MODEL, "prompt": ["x"] * 4, "max_tokens": 400}
        busy = [llm.start(make_request(prompt="x", max_tokens=1)) for _ in range(2)]
        response = client.post(COMPLETIONS, json=body)
        assert response.status_code == 429
        assert "x-receipt-id" not in response.headers
    del busy
    wait_until(lambda: not client.app.state.service.receipts._under_way)


# Runs that nobody waits for, and when a run is kept.


def test_a_run_that_ends_before_its_place_is_known_is_kept(llm):
    """The engine may end it before `submit` returns, and nobody may read it."""

    def submit(request, on_change, invocation):
        draw_all(generation := generation_of(llm, 3, prompt="x"))
        on_change()
        return generation

    async def run():
        store, log = ReceiptStore(9), RequestLog("POST", RUN)
        Answers(log, 0, store).submit(submit, [None, None])
        assert [*store._kept] == [log.id, f"{log.id}.1"]

    asyncio.run(run())


def test_a_run_is_kept_before_its_reader_learns_that_it_has_ended(llm):
    """The engine's thread may be about to say so."""
    generation = generation_of(llm, 3, prompt="x")

    async def run():
        store, log = ReceiptStore(9), RequestLog("POST", RUN)
        answers = Answers(log, log.began + 60, store)
        answers.submit(lambda request, on_change, invocation: generation, [None])
        assert not store._kept
        draw_all(generation)
        await answers.results()
        assert [*store._kept] == [log.id]

    asyncio.run(run())


def test_an_answer_under_way_has_none_yet_and_a_cancelled_one_has(llm):
    async def run():
        app = make_app(llm, receipts=9)
        async with app.router.lifespan_context(app):
            service = app.state.service
            await asyncio.to_thread(wait_until, lambda: service.ready)
            body = {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True}
            call = RawCall(COMPLETIONS, body | {"stream": True, "temperature": 5})
            answering = asyncio.create_task(call.run(app))
            while len(call.sent) < 4:
                await asyncio.sleep(0.001)
            headers = dict(call.sent[0]["headers"])
            receipt_id = headers[b"x-receipt-id"].decode()
            with pytest.raises(ApiError, match="its answer has not ended; ask again when it has"):
                service.receipts.statement(receipt_id)
            call.hang_up.set()
            await answering
            await asyncio.to_thread(wait_until, lambda: len(service.receipts))
            return service.receipts.statement(receipt_id)

    receipt = read_statement(asyncio.run(run()), "it")
    assert receipt.problems == []
    assert receipt.finish_reason == "cancelled"
    assert 0 < len(receipt.draws) < 400
    assert verdicts(llm, receipt) == ["EXACT"]


def test_a_request_whose_time_is_up_has_a_receipt_by_its_id(llm):
    with serving(llm, receipts=9, timeout_s=0.2) as client:
        with paused(llm):
            response = client.post(RUN, json=BODIES[RUN])
        assert response.status_code == 408
        assert "x-receipt-id" not in response.headers
        wait_until(lambda: len(client.app.state.service.receipts))
        receipt = fetch(client, response.headers["x-request-id"])
    assert (receipt.finish_reason, receipt.draws, receipt.text) == ("cancelled", [], "")
    assert verdicts(llm, receipt) == ["EXACT"]


def test_clients_that_hang_up_at_any_moment_leave_nothing_under_way(llm):
    async def run():
        app = make_app(llm, receipts=9)
        async with app.router.lifespan_context(app):
            receipts = app.state.service.receipts
            await asyncio.to_thread(wait_until, lambda: app.state.service.ready)
            await asyncio.gather(*(one(app, turns) for turns in range(50)))
            await asyncio.to_thread(
                wait_until, lambda: llm.engine.running == llm.engine.queued == 0
            )
            await asyncio.to_thread(wait_until, lambda: not receipts._under_way)
            await RawCall(RUN, {"prompt": QUESTION}).run(app)
            assert 1 <= len(receipts) <= 9
            assert receipts.held == sum(size for _, size in receipts._kept.values())
            return [receipts.statement(receipt_id) for receipt_id in receipts._kept]

    async def one(app, turns):
        call = RawCall(RUN, {"prompt": "x", "max_tokens": 100, "stream": turns % 2 == 0})
        answering = asyncio.create_task(call.run(app))
        await asyncio.sleep(turns / 1000)
        call.hang_up.set()
        await asyncio.wait_for(answering, 20)

    receipts = [read_statement(statement, "it") for statement in asyncio.run(run())]
    assert set(verdicts(llm, *receipts)) == {"EXACT"}


# Who may read them, and what they hold.


def test_receipts_need_the_token(llm):
    token = {"authorization": "Bearer s3cret"}
    with serving(llm, receipts=9, api_token="s3cret") as client:
        response = client.post(RUN, json=BODIES[RUN], headers=token)
        path = f"/receipts/{response.headers['x-receipt-id']}"
        assert client.get(path).json()["errors"][0]["code"] == 9106
        wrong = client.get(path, headers={"authorization": "Bearer other"})
        assert wrong.status_code == 401
        assert client.get(path, headers=token).status_code == 200
    with serving(llm, receipts=9, local_only=True) as client:
        client.headers["host"] = "localhost"
        path = f"/receipts/{client.post(RUN, json=BODIES[RUN]).headers['x-receipt-id']}"
        assert client.get(path).status_code == 200
        assert client.get(path, headers={"origin": "https://evil.example"}).status_code == 403


def test_private_receipts_have_no_prompt_and_no_text(llm):
    with serving(llm, receipts=9, private_receipts=True) as client:
        response = client.post(RUN, json=BODIES[RUN], headers={"x-receipt": "true"})
        fetched = client.get(f"/receipts/{response.headers['x-receipt-id']}").json()
    statement = response.json()["result"]["receipt"]
    assert statement == fetched
    receipt = read_statement(statement, "it")
    assert receipt.is_private
    assert receipt.problems == []
    assert "content" not in json.dumps(statement)
    assert QUESTION not in json.dumps(statement)
    assert verdicts(llm, receipt) == ["NOT_REPLAYABLE"]


def test_weights_without_a_digest_have_no_receipts(llm, client, monkeypatch):
    monkeypatch.setattr(llm.engine, "environment", UNKNOWN)
    with pytest.raises(InputError, match="weights have no digest"):
        make_app(llm, receipts=1)
    for stream in (False, True):  # said before anything is generated, so to a stream too
        body = BODIES[RUN] | {"stream": stream}
        response = client.post(RUN, json=body, headers={"x-receipt": "true"})
        assert response.status_code == 400
        assert "weights have no digest" in response.json()["errors"][0]["message"]


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_a_number_of_receipts_out_of_range_is_refused(count):
    with pytest.raises(InputError, match=f"receipts is {count}, expected a whole number from 0"):
        Settings(receipts=count)


# Its description, and its metrics.


@pytest.mark.parametrize("signed", [False, True])
def test_receipts_are_as_described(llm, tmp_path, signed):
    signer = signing.Pair(tmp_path, "ours").signer if signed else None
    with serving(llm, receipts=9, signer=signer) as client:
        document = client.get("/openapi.json").json()
        response = client.post(RUN, json=BODIES[RUN], headers={"x-receipt": "true"})
        fetched = client.get(f"/receipts/{response.headers['x-receipt-id']}")
        missing = client.get("/receipts/x")
    assert ("payload" in fetched.json()) == signed
    native = "/client/v4/accounts/{account}/ai/run/{model}"
    for answer, method, path in (
        (response, "post", native),
        (fetched, "get", "/receipts/{receipt_id}"),
        (missing, "get", "/receipts/{receipt_id}"),
    ):
        described = document["paths"][path][method]["responses"][str(answer.status_code)]
        schema = described["content"]["application/json"]["schema"]
        schema |= {"components": document["components"]}
        assert Draft202012Validator(schema).is_valid(answer.json())
        assert not Draft202012Validator(schema).is_valid({})
