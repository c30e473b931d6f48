"""The server: what every route has in common, and the routes of Workers AI."""

import asyncio
import gc
import json
import logging
import re

import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from llama_jax import InputError, Llama
from llama_jax.card import schemas as card
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.request import make_request
from llama_jax.server import access_log, middleware, page
from llama_jax.server.openapi import document as openapi
from llama_jax.server.request_log import RequestLog
from llama_jax.server.settings import Settings
from tests.helpers.demo import load_demo
from tests.helpers.serving import (
    ANSWER,
    ASKING,
    CHAT,
    COMMENT,
    COMPLETIONS,
    MODEL,
    NATIVE,
    QUESTION,
    RUN,
    RawCall,
    events_of,
    make_app,
    native_usage,
    paused,
    serving,
    wait_until,
)

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=4)


@pytest.fixture
def client(llm):
    with serving(llm) as client:
        yield client


def check_error(response, status, code, text, *, front_door=False):
    """Compare a response with the contract's envelope and the object beside it."""
    assert response.status_code == status, response.text
    check_error_body(response, response.json(), code, text, front_door)
    assert response.json()["error"]["code"] == str(code)
    assert response.json()["error"]["message"] == response.json()["errors"][0]["message"]


def check_error_body(response, body, code, text, front_door=False):
    [error] = body["errors"]
    assert error["code"] == code
    if front_door:
        assert error["message"] == text
    else:
        request_id = response.headers["x-request-id"]
        assert re.fullmatch(UUID, request_id)
        assert error["message"] == f"AiError: {text} ({request_id})"
    assert body["success"] is False
    assert body["result"] == (None if front_door else {})
    assert body["messages"] == []
    assert body.keys() == {"errors", "success", "result", "messages", "error"}


# Running the model.


def test_run(client, llm):
    response = client.post(RUN, json={"prompt": QUESTION, "seed": 7})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    expected = llm.generate(prompt=QUESTION, seed=7)
    assert response.json() == {
        "result": {
            "response": expected.response,
            "tool_calls": [],
            "usage": native_usage(expected),
            "finish_reason": "stop",
            "seed": 7,
            "fingerprint": expected.fingerprint,
        },
        "success": True,
        "errors": [],
        "messages": [],
    }
    assert expected.response == ANSWER


@pytest.mark.parametrize(
    "path", [MODEL, MODEL.replace("/", "%2F"), MODEL.replace("/", "%2f", 1), f"%40{MODEL[1:]}"]
)
def test_slashes_of_the_model_may_be_encoded(client, path):
    response = client.post(f"{NATIVE}/run/{path}", json={"prompt": QUESTION, "max_tokens": 1})
    assert response.status_code == 200


def test_a_body_is_parsed_whatever_its_content_type(client):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = client.post(RUN, content=b'{"prompt":"hi","max_tokens":1}', headers=headers)
    assert response.status_code == 200


def test_stream(client):
    body = {"prompt": QUESTION, "seed": 7}
    response = client.post(RUN, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *texts, ending, done = events_of(response.text)
    assert done == "[DONE]"
    assert all(event.keys() == {"response"} and event["response"] for event in texts)
    assert response.text.startswith(COMMENT + 'data: {"response":"The')  # compact
    assert '": ' not in response.text
    whole = client.post(RUN, json=body).json()["result"]
    assert "".join(event["response"] for event in texts) == whole["response"]
    del whole["tool_calls"]
    assert ending == {**whole, "response": ""}
    assert response.headers["x-seed"] == "7"
    drawn = client.post(RUN, json={"prompt": QUESTION, "stream": True})
    assert drawn.headers["x-seed"] == str(events_of(drawn.text)[-2]["seed"])


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (RUN, {"prompt": "x"}),
        (CHAT, {"model": MODEL, "messages": [ASKING]}),
        (COMPLETIONS, {"model": MODEL, "prompt": "x"}),
    ],
)
def test_the_engine_learns_whether_an_answer_is_streamed(client, llm, monkeypatch, url, body):
    submit, said = llm.engine.submit, []

    def noted(*args, streamed, **options):
        said.append(streamed)
        return submit(*args, streamed=streamed, **options)

    monkeypatch.setattr(llm.engine, "submit", noted)
    for stream in (True, False):
        assert client.post(url, json={**body, "max_tokens": 1, "stream": stream}).is_success
    assert said == [True, False]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Tell me of the sea", "temperature": 3, "top_k": 50},
        {"prompt": "日本 é 😀", "temperature": 5, "raw": True},
        {"messages": [ASKING], "temperature": 2, "repetition_penalty": 1.3},
        {"prompt": "x", "max_tokens": 0},
    ],
)
def test_streamed_text_is_the_whole_text(client, body):
    body = {"seed": 11, "max_tokens": 60, **body}
    whole = client.post(RUN, json=body).json()["result"]
    *texts, ending, _ = events_of(client.post(RUN, json={**body, "stream": True}).text)
    assert "".join(event["response"] for event in texts) == whole["response"]
    assert (ending["usage"], ending["finish_reason"]) == (whole["usage"], whole["finish_reason"])


def test_ignored_fields_are_named(client):
    body = {"messages": [{**ASKING, "name": "Ann"}], "top_x": 1, "stop": None, "max_tokens": 1}
    messages = client.post(RUN, json=body).json()["messages"]
    assert [note["message"].split()[0] for note in messages] == ["top_x", "messages[0].name"]
    assert all(isinstance(note["code"], int) for note in messages)
    *_, ending, _ = events_of(client.post(RUN, json={**body, "stream": True}).text)
    assert ending["messages"] == messages


# What goes wrong.


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "required properties at '/' are 'prompt', required properties at '/' are 'messages'"),
        ([], "required properties at '/' are 'prompt', required properties at '/' are 'messages'"),
        ({"prompt": "x", "temperature": 9}, "'/temperature' must be <= 5"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "required properties at '/' are 'prompt', "
            "Type mismatch of '/messages/0/content', 'string' not in 'null'",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_body_against_the_schema_is_5006(client, body, text, stream):
    if stream and isinstance(body, dict):
        body = {**body, "stream": True}
    head = "Bad input: Error: oneOf at '/' not met, 0 matches: "
    check_error(client.post(RUN, json=body), 400, 5006, head + text)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"prompt": NaN}', "NaN is not a number of JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "too large"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper"),
        (b'{"prompt":' * 60_000, "nested deeper"),
        (b'{"prompt":' * 200_000, "200,000 objects and arrays"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "given twice"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "role assistant"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool'"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"prompt": "[INST] x [/INST]"}', "control tag"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "max_tokens": -1}', "max_tokens is -1"),
    ],
)
def test_invalid_requests_are_5006(client, body, part):
    response = client.post(RUN, content=body)
    assert part in response.json()["errors"][0]["message"]
    text = response.json()["errors"][0]["message"].removeprefix("AiError: ").rpartition(" (")[0]
    assert text.startswith("Bad input: Error: ")
    check_error(response, 400, 5006, text)


@pytest.mark.parametrize("path", [f"{NATIVE}/run/@cf/x/y", f"{NATIVE}/run/@cf%2Fx%2Fy"])
def test_another_model_is_5007(client, path):
    text = "No such model: No such model @cf/x/y or task"
    check_error(client.post(path, json={"prompt": "x"}), 400, 5007, text)


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_tokens_are_5021(client, llm, stream):
    prompt = len(make_request(prompt=QUESTION).encode(llm.tokenizer, llm.config.vocab_size))
    body = {"prompt": QUESTION, "max_tokens": 513 - prompt, "stream": stream}
    text = (
        "Ai: The estimated number of input and maximum output tokens (513) exceeded this model "
        "context window limit (512)."
    )
    check_error(client.post(RUN, json=body), 413, 5021, text)
    assert client.post(RUN, json={**body, "max_tokens": 512 - prompt}).status_code == 200


def test_no_route_and_wrong_method(client):
    for path in ("/nope", f"{NATIVE}/nope", f"{NATIVE}/run"):
        check_error(client.get(path), 404, 7000, "No route for that URI", front_door=True)
    for method in ("GET", "DELETE"):
        response = client.request(method, RUN)
        text = f"{method} not supported for requested URI."
        check_error(response, 405, 7001, text, front_door=True)
        assert "POST" in response.headers["allow"]


def test_a_full_queue_is_429(client, llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "max_queue", 1)
    with paused(llm):
        waiting = [llm.engine.submit(make_request(prompt="x", max_tokens=1)) for _ in range(5)]
        response = client.post(RUN, json={"prompt": "x"})
        text = "Ai: Capacity temporarily exceeded, please try again."
        check_error(response, 429, 3040, text)
        assert int(response.headers["retry-after"]) > 0
        assert rejections(client) == {"queue_full": 1}
    wait_until(lambda: all(generation.done for generation in waiting))
    assert client.post(RUN, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_client_has_its_share_of_the_queue_by_its_address(llm):
    request = make_request(prompt="x", max_tokens=1)
    with serving(llm, max_queue_per_client=3, timeout_s=9) as client:
        with paused(llm):
            others = [llm.engine.submit(request, client="10.0.0.1") for _ in range(50)]
            own = [llm.engine.submit(request, client="testclient") for _ in range(4 + 3)]
            assert client.post(RUN, json={"prompt": "x"}).status_code == 429
            response = client.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"})
            assert response.json()["error"]["message"].startswith("Too many requests from your")
            assert rejections(client) == {"client_share": 2}
        wait_until(lambda: all(generation.done for generation in [*others, *own]))
        assert client.post(RUN, json={"prompt": "x", "max_tokens": 1}).status_code == 200
    with pytest.raises(InputError, match="max_queue_per_client is -1, expected a whole number"):
        Settings(max_queue_per_client=-1)
    with pytest.raises(InputError, match="max_slots_per_client is 0, expected a whole number"):
        Settings(max_slots_per_client=0)


def test_a_request_that_takes_too_long_is_408(llm):
    with serving(llm, timeout_s=0.05) as client:
        with paused(llm):
            response = client.post(RUN, json={"prompt": "x"})
            check_error(response, 408, 3007, "Ai: Request timeout")
            assert response.headers["x-should-retry"] == "false"
            response = client.post(RUN, json={"prompt": "x", "stream": True})
            [error] = events_of(response.text)
            check_error_body(response, error, 3007, "Ai: Request timeout")
        wait_until(lambda: llm.engine.running == llm.engine.queued == 0)


def test_a_body_that_does_not_come_is_408(llm):
    async def run():
        app = make_app(llm, timeout_s=0.05)
        async with app.router.lifespan_context(app):
            call = RawCall(RUN, {})
            call._messages.clear()
            await call.run(app)
            return call.sent[0]["status"]

    assert asyncio.run(run()) == 408


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_413(llm, chunked):
    body = json.dumps({"prompt": "x" * 1000}).encode()

    def chunks():
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    with serving(llm, max_body_bytes=500) as client:
        response = client.post(RUN, content=chunks() if chunked else body)
        check_error(response, 413, 3006, "Ai: Request is too large")
        small = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        padded = small + b" " * (500 - len(small))
        assert client.post(RUN, content=padded).status_code == 200
        assert client.post(RUN, content=padded + b" ").status_code == 413


def test_a_bug_is_500_and_logged(client, llm, monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("a secret of the implementation")

    monkeypatch.setattr(llm.executor, "prefill_chunk", broken)
    for stream in (False, True):
        response = client.post(RUN, json={"prompt": "x", "stream": stream})
        if stream:
            [error] = events_of(response.text)
            check_error_body(response, error, 5000, "Ai: Internal server error")
        else:
            check_error(response, 500, 5000, "Ai: Internal server error")
        [record] = [r for r in caplog.records if r.name == "llama_jax.server"]
        assert "a secret" in caplog.text
        assert response.headers["x-request-id"] in record.getMessage()
        caplog.clear()
    monkeypatch.undo()
    assert client.post(RUN, json={"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [(RUN, {"prompt": 1}), (COMPLETIONS, {"prompt": "word " * 1000}), ("/tokenize", {"prompt": 1})],
)
def test_refused_request_leaves_nothing_for_the_garbage_collector(llm, path, fields):
    """The frames of an error hold the body, and all that was made of it."""
    mark = ["a value of this body"]

    def remains():
        return sum(type(each) is list and each == mark for each in gc.get_objects()) > 1

    async def run():
        app = make_app(llm)
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(wait_until, lambda: app.state.service.ready)
            call = RawCall(path, {"model": MODEL, "more": mark, **fields})
            gc.collect()
            gc.disable()
            try:
                await call.run(app)
                wait_until(lambda: not remains(), 5)  # the thread may hold it for a moment
            finally:
                gc.enable()
            return call.sent[0]["status"]

    assert asyncio.run(run()) >= 400


def test_an_error_in_midstream_ends_it_without_done(client, llm, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a secret of the implementation")

    monkeypatch.setattr(llm.executor, "decode", broken)
    response = client.post(RUN, json={"prompt": QUESTION, "stream": True})
    assert response.status_code == 200
    text, error = events_of(response.text)
    assert text == {"response": "The"}
    assert error["errors"][0]["code"] == 5000
    assert response.headers["x-request-id"] in error["errors"][0]["message"]
    assert error["success"] is False
    assert "secret" not in response.text


# Streams and proxies.


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (RUN, {"prompt": QUESTION}),
        (CHAT, {"model": MODEL, "messages": [ASKING]}),
        (COMPLETIONS, {"model": MODEL, "prompt": "x"}),
    ],
)
def test_a_stream_begins_at_once_and_is_kept_alive_while_it_waits(llm, url, body):
    async def run():
        app = make_app(llm, keep_alive_s=0.01)
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(wait_until, lambda: app.state.service.ready)
            call = RawCall(url, body | {"stream": True, "temperature": 0, "max_tokens": 3})
            with paused(llm):
                answering = asyncio.create_task(call.run(app))
                await asyncio.wait_for(call.came.wait(), 20)
                assert call.sent[0]["status"] == 200
                async with asyncio.timeout(20):
                    while len(call.sent) < 5:
                        await asyncio.sleep(0.01)
            await asyncio.wait_for(answering, 20)
        return [message["body"].decode() for message in call.sent[1:]]

    parts = asyncio.run(run())
    assert parts[:4] == [COMMENT] * 4
    assert events_of("".join(parts))[-1] == "[DONE]"
    assert len(parts) > 5


@pytest.mark.parametrize("url", [RUN, CHAT])
def test_what_is_wrong_before_the_queue_is_an_ordinary_error_of_a_stream_too(
    client, llm, monkeypatch, url
):
    body = {"model": MODEL, "messages": [ASKING], "stream": True}
    for fields, status in (({"temperature": 9}, 400), ({"max_tokens": 5000}, (413, 400))):
        response = client.post(url, json=body | fields)
        expected = status if isinstance(status, int) else status[url == CHAT]
        assert response.status_code == expected
        assert response.headers["content-type"] == "application/json"
    monkeypatch.setattr(llm.engine, "max_queue", 0)
    with paused(llm):
        waiting = [llm.engine.submit(make_request(prompt="x", max_tokens=1)) for _ in range(4)]
        assert client.post(url, json=body).status_code == 429
    wait_until(lambda: all(generation.done for generation in waiting))


def test_a_client_that_leaves_a_silent_stream_frees_its_place(llm):
    """As soon as it has the head, the first comment or one of the next."""

    class Leaving(RawCall):
        async def _send(self, message):
            await super()._send(message)
            if len(self.sent) == self.parts:
                self.hang_up.set()
                await asyncio.Event().wait()

    async def run(parts):
        app = make_app(llm, keep_alive_s=0.01)
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(wait_until, lambda: app.state.service.ready)
            call = Leaving(RUN, {"prompt": "x", "stream": True, "max_tokens": 400})
            call.parts = parts
            with paused(llm):
                await asyncio.wait_for(call.run(app), 20)
            await asyncio.to_thread(wait_until, lambda: not llm.engine.running + llm.engine.queued)

    for parts in (1, 2, 4):
        before = llm.engine.counts.ended.get("cancelled", 0)
        asyncio.run(run(parts))
        assert llm.engine.counts.ended["cancelled"] == before + 1


# Tokens.


@pytest.mark.parametrize(
    ("headers", "status", "code", "text"),
    [
        ({}, 400, 9106, "Missing X-Auth-Key, X-Auth-Email or Authorization headers"),
        (
            {"X-Auth-Key": "s3cret"},
            *(400, 9106, "Missing X-Auth-Key, X-Auth-Email or Authorization headers"),
        ),
        ({"Authorization": "s3cret"}, 400, 6003, "Invalid request headers"),
        ({"Authorization": "Bearer "}, 400, 6003, "Invalid request headers"),
        ({"Authorization": "Basic s3cret"}, 400, 6003, "Invalid request headers"),
        ({"Authorization": "Bearer s3cre"}, 401, 10000, "Authentication error"),
        ({"Authorization": "Bearer s3cret1"}, 401, 10000, "Authentication error"),
        ({"Authorization": b"Bearer \xff"}, 401, 10000, "Authentication error"),
        ({"X-Auth-Key": "no", "X-Auth-Email": "a@b.c"}, 401, 10000, "Authentication error"),
    ],
)
def test_requests_without_the_token_are_refused(llm, headers, status, code, text):
    with serving(llm, api_token="s3cret") as client:
        for method, path in [("POST", RUN), ("GET", "/metrics")]:
            response = client.request(method, path, headers=headers)
            body = response.json()
            chain = body["errors"][0].pop("error_chain", None)
            assert (chain is not None) == (code == 6003)
            if chain:
                text_6111 = "Invalid format for Authorization header"
                assert chain == [{"code": 6111, "message": text_6111}]
            check_error(response, status, code, text, front_door=True)


@pytest.mark.parametrize("path", [CHAT, f"{NATIVE}/v1/completions", "/v1/models"])
def test_openais_routes_refuse_in_openais_words(llm, path):
    method = "GET" if path.endswith("models") else "POST"
    with serving(llm, api_token="s3cret", max_body_bytes=500) as client:

        def refused(path=path, method=method, content=b"", **headers):
            response = client.request(method, path, content=content, headers=headers)
            error = response.json()["error"]
            assert error["param"] is None
            assert "AiError" not in error["message"]
            assert "AiError" in str(response.json()["errors"]) or response.json()["result"] is None
            return response.status_code, error["type"], error["code"]

        invalid = "invalid_request_error"
        assert refused() == (401, invalid, "invalid_api_key")
        assert refused(Authorization="Basic x") == (401, invalid, "invalid_api_key")
        assert refused(Authorization="Bearer x") == (401, invalid, "invalid_api_key")
        key = {"Authorization": "Bearer s3cret"}
        assert refused(method="DELETE", **key) == (405, invalid, "method_not_supported")
        assert refused(path="/v1/nope", **key) == (404, invalid, "unknown_url")
        assert refused(content=b"x" * 501, **key) == (413, invalid, "request_too_large")
        if method == "POST":
            assert refused(content=b"{", **key) == (400, invalid, "invalid_value")
            client.app.state.service.drain()
            body = json.dumps({"model": MODEL, "messages": [ASKING], "prompt": "x"}).encode()
            status = (503, "server_error", "service_unavailable")
            assert refused(content=body, **key) == status


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://127.0.0.1:8787", True),
        ("https://example.com", True),  # named below
        ("http://127.0.0.1:8788", False),
        ("http://127.0.0.1", False),
        ("http://example.com", False),
        ("http://192.0.2.1", False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_without_a_token_only_local_and_allowed_origins_are_answered(llm, origin, allowed):
    headers = {"Host": "127.0.0.1:8787"} | ({"Origin": origin} if origin else {})
    body = {"prompt": "x", "max_tokens": 1}
    with serving(llm, local_only=True, allowed_origins=("https://example.com",)) as client:
        response = client.post(RUN, json=body, headers=headers)
        if allowed:
            assert response.status_code == 200
        else:
            text = (
                f"Unauthorized to access requested resource: pages of {origin!r} are not "
                "allowed; add that origin to --allowed_origins, or give the server an API token"
            )
            check_error(response, 403, 9109, text, front_door=True)
    with serving(llm, local_only=True, allowed_origins=("*",)) as client:
        assert client.post(RUN, json=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("localhost:8787", True),
        ("LOCALHOST:8787", True),
        ("chat.localhost:8787", True),
        ("127.0.0.1:8787", True),
        ("[::1]:8787", True),
        ("192.0.2.1", True),
        ("example.com", False),
        ("example.com:8787", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("127.0.0.1.example.com:8787", False),
        ("localhost@example.com", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_without_a_token_only_local_host_names_are_answered(llm, host, local):
    with serving(llm, local_only=True) as client:
        response = client.get(f"{NATIVE}/models/search", headers={"Host": host})
        if local:
            assert response.status_code == 200
        else:
            text = (
                f"Unauthorized to access requested resource: {host!r} is not a name of this "
                "machine; give the server an API token, or start it with --insecure"
            )
            check_error(response, 403, 9109, text, front_door=True)
        assert client.get("/healthz", headers={"Host": host}).status_code == 200


def test_requests_with_the_token_are_answered(llm):
    with serving(llm, api_token="s3cret") as client:
        for headers in (
            {"Authorization": "Bearer s3cret"},
            {"authorization": "bearer s3cret"},
            {"X-Auth-Key": "s3cret", "X-Auth-Email": "a@b.c"},
        ):
            assert client.get("/metrics", headers=headers).status_code == 200
            body = {"prompt": "x", "max_tokens": 1}
            assert client.post(RUN, json=body, headers=headers).status_code == 200
        for path in ("/", "/health", "/healthz", "/readyz", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_without_a_configured_token_any_header_is_accepted(client):
    for headers in ({}, {"Authorization": "nonsense"}, {"Authorization": "Bearer x"}):
        assert client.get("/metrics", headers=headers).status_code == 200


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="api_token is empty"):
        Settings(api_token=" ")
    with pytest.raises(InputError, match="timeout_s is 0"):
        Settings(timeout_s=0)
    with pytest.raises(InputError, match="max_body_bytes is nan"):
        Settings(max_body_bytes=float("nan"))
    for origin in ("example.com", "https://example.com/", "https://example.com/a", "https://", ""):
        with pytest.raises(InputError, match=f"allowed_origins has '{origin}', expected"):
            Settings(allowed_origins=("*", "https://example.com:8443", origin))


def test_cors_headers_are_sent_to_allowed_origins_only(llm):
    origin = {"origin": "https://example.com"}
    asking = {"access-control-request-method": "POST", **origin}
    with serving(llm, api_token="x") as client:
        assert "access-control-allow-origin" not in client.get("/healthz", headers=origin).headers
    with serving(llm, api_token="x", allowed_origins=("https://example.com",)) as client:
        assert client.options(RUN, headers=asking).status_code == 200
        refusal = client.post(RUN, json={}, headers=origin)  # a page is to read why
        assert refusal.status_code == 400
        assert refusal.headers["access-control-allow-origin"] == "https://example.com"
        assert "x-receipt-id" in refusal.headers["access-control-expose-headers"]
        other = client.get("/healthz", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


# Clients that go away.


def test_disconnected_client_frees_its_slot(llm, caplog):
    """Within one turn of the engine, whether the answer was streamed or waited for."""
    caplog.set_level(logging.INFO, "llama_jax.access")
    body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True, "temperature": 5}

    async def run():
        app = make_app(llm)
        async with app.router.lifespan_context(app):
            await wait(lambda: app.state.service.ready)
            for stream in (True, False):
                drawn = llm.engine.counts.tokens
                ended = dict(llm.engine.counts.ended)
                call = RawCall(COMPLETIONS, {**body, "stream": stream})
                answering = asyncio.create_task(call.run(app))
                await wait(lambda drawn=drawn: llm.engine.counts.tokens > drawn)
                with paused(llm):
                    call.hang_up.set()
                    await asyncio.wait_for(answering, 20)
                await wait(lambda: llm.engine.running == 0)
                assert llm.engine.counts.ended["cancelled"] == ended.get("cancelled", 0) + 1
                assert llm.engine.counts.tokens - drawn < 500
                assert not any(m.get("body") == b"data: [DONE]\n\n" for m in call.sent)

    async def wait(condition):
        await asyncio.to_thread(wait_until, condition)

    asyncio.run(run())
    streamed, waited = [json.loads(record.getMessage()) for record in caplog.records]
    assert (streamed["client_disconnected"], waited["client_disconnected"]) == (True, True)
    assert streamed["prompt_tokens"] == waited["prompt_tokens"] > 0
    assert 0 < streamed["completion_tokens"] < 500


@pytest.mark.slow
def test_a_thousand_disconnects_leave_no_slot_in_use(llm, caplog):
    """At any moment of a request's life: after none, one, two ... turns of the event loop."""
    caplog.set_level(logging.INFO, "llama_jax.access")

    async def run():
        app = make_app(llm)
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(wait_until, lambda: app.state.service.ready)
            for _ in range(20):
                await asyncio.gather(*(one(app, turns) for turns in range(50)))
            await asyncio.to_thread(
                wait_until, lambda: llm.engine.running == llm.engine.queued == 0
            )
            whole = RawCall(RUN, {"prompt": QUESTION, "temperature": 0})
            await whole.run(app)
            assert ANSWER in str(whole.sent)

    async def one(app, turns):
        call = RawCall(RUN, {"prompt": "x", "max_tokens": 400, "stream": turns % 2 == 0})
        answering = asyncio.create_task(call.run(app))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.hang_up.set()
        await asyncio.wait_for(answering, 20)

    asyncio.run(run())
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert sum(line["client_disconnected"] for line in lines) > 900


def test_stream_that_is_not_read_times_out(llm, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "llama_jax.access")
    monkeypatch.setattr(middleware, "_READING_S", -18)  # reading ends before the answer's own time
    llm.generate(prompt="x", max_tokens=9)  # compiled by now

    class Stuck(RawCall):
        async def _send(self, message):
            await super()._send(message)
            if message.get("body", b"").startswith(b"data: "):
                await asyncio.Event().wait()

    async def run():
        app = make_app(llm, timeout_s=20)
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(wait_until, lambda: app.state.service.ready)
            await Stuck(RUN, {"prompt": "x", "stream": True, "max_tokens": 400}).run(app)
            await asyncio.to_thread(wait_until, lambda: llm.engine.running == 0)

    asyncio.run(run())
    [line] = [json.loads(record.getMessage()) for record in caplog.records]
    assert (line["status"], line["error_code"]) == (200, 3007)


# Models.


def test_models_search(client):
    def search(**params):
        body = client.get(f"{NATIVE}/models/search", params=params).json()
        assert body["success"]
        assert body["result_info"]["count"] == len(body["result"])
        return body["result"]

    [model] = search()
    assert model["name"] == MODEL
    assert model["task"]["name"] == "Text Generation"
    for params in (
        {"search": "llama-2"},
        {"task": "text generation"},
        {"author": "Meta"},
        {"source": 1},
        {"hide_experimental": "true"},
        {"page": 1, "per_page": 1},
    ):
        assert search(**params) == [model]
    for params in (
        {"search": "mistral"},
        {"task": "Translation"},
        {"author": "google"},
        {"source": 2},
        {"page": 2},
        {"page": 3, "per_page": 100},
    ):
        assert search(**params) == []
    for params in (
        {"page": 0},
        {"page": "x"},
        {"page": "1" * 5000},
        {"per_page": 101},
        {"hide_experimental": "maybe"},
    ):
        assert client.get(f"{NATIVE}/models/search", params=params).status_code == 400


def test_models_schema_is_the_card_byte_for_byte(client):
    response = client.get(f"{NATIVE}/models/schema", params={"model": MODEL})
    assert card.INPUT_SCHEMA in response.content
    assert card.OUTPUT_SCHEMA in response.content
    schemas = {"input": json.loads(card.INPUT_SCHEMA), "output": json.loads(card.OUTPUT_SCHEMA)}
    assert response.json() == {"result": schemas, "success": True, "errors": [], "messages": []}
    assert client.get(f"{NATIVE}/models/schema").json()["errors"][0]["code"] == 5006
    other = client.get(f"{NATIVE}/models/schema", params={"model": "x"})
    check_error(other, 400, 5007, "No such model: No such model x or task")


# Watching it.


def test_ready_only_when_warm_and_until_drained(llm, monkeypatch):
    go_on = asyncio.Event()

    def warm_up():
        yield 1, 2
        wait_until(go_on.is_set)
        yield 2, 2

    monkeypatch.setattr(llm.engine, "warm_up", warm_up)
    app = make_app(llm, warm_up=True)
    with TestClient(app) as client:
        assert client.get("/readyz").status_code == client.get("/health").status_code == 503
        assert client.get("/healthz").status_code == 200
        response = client.post(RUN, json={"prompt": "x"})
        text = "Ai: The model is not available now: it is warming up"
        check_error(response, 503, 5001, text)
        assert int(response.headers["retry-after"]) > 0
        go_on.set()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/health").status_code == 200
        app.state.service.drain()
        for path in ("/readyz", "/health"):
            response = client.get(path)
            assert (response.status_code, response.text) == (503, "shutting down\n")
        assert client.get("/healthz").status_code == 200
        assert client.post(CHAT, json={"model": MODEL, "messages": [ASKING]}).status_code == 503


def test_server_whose_engine_failed_is_not_ready(llm, monkeypatch, caplog):
    def warm_up():
        yield 1, 2
        raise RuntimeError("no such device")

    monkeypatch.setattr(llm.engine, "warm_up", warm_up)
    app = make_app(llm, warm_up=True)
    with TestClient(app) as client:
        wait_until(lambda: app.state.service.failed)
        for path in ("/readyz", "/health"):
            response = client.get(path)
            assert (response.status_code, response.text) == (503, "broken\n")
    assert "no such device" in caplog.text


def metrics_of(client):
    samples = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            samples[sample.name, *sorted(sample.labels.values())] = sample.value
    return {name: value for name, value in samples.items() if not name[0].endswith("_created")}


def rejections(client):
    """Return how many requests were refused, by reason."""
    name = "llama_jax_rejections_total"
    return {key[1]: value for key, value in metrics_of(client).items() if key[0] == name}


def test_metrics_count(client, llm):
    before = metrics_of(client)
    for stream in (False, True):
        client.post(RUN, json={"prompt": QUESTION, "temperature": 0, "stream": stream})
    client.post(RUN, json={})
    client.get("/nope")
    after = metrics_of(client)

    def grown(*name):
        return after[name] - before.get(name, 0)

    assert grown("llama_jax_http_requests_total", "200", "POST", "run") == 2
    assert grown("llama_jax_http_requests_total", "400", "POST", "run") == 1
    assert grown("llama_jax_http_requests_total", "404", "GET", "none") == 1
    assert grown("llama_jax_errors_total", "5006") == 1
    assert grown("llama_jax_errors_total", "7000") == 1
    assert grown("llama_jax_request_success_total", "run", "stop") == 2
    assert grown("llama_jax_prompt_tokens_total") == 28
    assert grown("llama_jax_generation_tokens_total") == 20  # with EOS
    assert grown("llama_jax_request_generation_tokens_sum") == 18
    for histogram, *labels in (
        ("time_to_first_token_seconds", "short"),
        ("time_per_output_token_seconds",),
        ("e2e_request_latency_seconds", "short"),
        ("request_queue_time_seconds", "short"),
    ):
        assert grown(f"llama_jax_{histogram}_count", *labels) == 2
        assert 0 < grown(f"llama_jax_{histogram}_sum", *labels) < 20
    assert after["llama_jax_num_requests_running",] == 0
    assert after["llama_jax_num_requests_waiting",] == 0
    assert after["llama_jax_num_slots",] == 4
    assert after["llama_jax_compiled_programs",] == len(llm.executor.compiled.names)


def test_latencies_are_told_apart_by_the_prompts_length(llm):
    """Of a request with several prompts the longest counts, for the queue each one."""
    with serving(llm) as client:
        for prompt in ([5] * 256, [[5] * 200] * 2, [5] * 257, [[5] * 9, [5] * 300]):
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "add_special_tokens": False}
            assert client.post(COMPLETIONS, json=body).status_code == 200
        client.app.state.metrics.observe(
            RequestLog("POST", COMPLETIONS, longest_prompt=2049, first_text_s=1)
        )
        counts = metrics_of(client)
    for histogram, short, medium, long in (
        ("time_to_first_token_seconds", 2, 2, 1),
        ("e2e_request_latency_seconds", 2, 2, 0),
        ("request_queue_time_seconds", 4, 2, 0),
    ):
        name = f"llama_jax_{histogram}_count"
        assert counts[name, "short"] == short
        assert counts[name, "medium"] == medium
        assert counts[name, "long"] == long


def test_metrics_show_the_queue(client, llm):
    with paused(llm):
        generation = llm.engine.submit(make_request(prompt="x", max_tokens=1))
        assert metrics_of(client)["llama_jax_num_requests_waiting",] == 1
    wait_until(lambda: generation.done)


def test_metrics_show_the_share_of_the_caches_in_use(client, llm):
    """One generation has a fourth of four slots' caches, however short it is."""
    name = ("llama_jax_kv_cache_usage_perc",)
    wait_until(lambda: metrics_of(client)[name] == 0)
    generation = llm.engine.submit(make_request(prompt="x", max_tokens=400, ignore_eos=True))
    wait_until(lambda: llm.engine.running)
    with paused(llm):
        assert not generation.done
        assert metrics_of(client)[name] == 0.25
    generation.cancel()
    wait_until(lambda: metrics_of(client)[name] == 0)


def test_metrics_count_reused_tokens(client):
    system = {"role": "system", "content": "Be brief and kind. " * 10}
    before = metrics_of(client)
    for _ in range(2):
        client.post(RUN, json={"messages": [system, ASKING], "max_tokens": 1})
    after = metrics_of(client)
    name = ("llama_jax_prefix_reused_tokens_total",)
    assert after[name] - before[name] >= 16


def test_metrics_count_drafts():
    llm = Llama.load(DEMO_CHECKPOINT, slots=2, context=300, speculate="ngram")
    with serving(llm) as client:
        client.post(RUN, json={"prompt": QUESTION, "temperature": 0})
        found = metrics_of(client)
    names = ("drafted_tokens", "accepted_tokens", "passes", "pass_tokens")
    drafted, accepted, passes, tokens = (
        found[f"llama_jax_speculative_{name}_total",] for name in names
    )
    assert 0 <= accepted <= drafted
    assert 0 < passes <= tokens == found["llama_jax_generation_tokens_total",] - 1


def test_access_log_has_no_prompt_answer_or_secret(llm, caplog):
    caplog.set_level(logging.INFO, "llama_jax.access")
    with serving(llm, api_token="s3cret-token") as client:
        caplog.clear()
        client.headers["authorization"] = "Bearer s3cret-token"
        response = client.post(RUN, json={"prompt": QUESTION, "temperature": 0})
        client.post(f"{CHAT}?key=hidden", json={"model": MODEL, "messages": "a private matter"})
    first, second = [json.loads(record.getMessage()) for record in caplog.records]
    assert first.pop("request_id") == response.headers["x-request-id"]
    assert first.pop("time").startswith("20")
    assert 0 < first.pop("ttft_s") <= first.pop("duration_s") < 20
    assert first == {
        "method": "POST",
        "path": RUN,
        "route": "run",
        "session_id": None,
        "session_affinity": None,
        "status": 200,
        "error_code": None,
        "prompt_tokens": 14,
        "completion_tokens": 9,
        "finish_reason": "stop",
        "client_disconnected": False,
    }
    assert (second["status"], second["error_code"], second["ttft_s"]) == (400, 5006, None)
    for secret in (QUESTION, "France", "Paris", "s3cret", "private", "hidden"):
        assert secret not in caplog.text


def test_access_log_has_the_names_of_sessions(llm, caplog):
    """Those that a router in front reads. They change no answer, and a long one is shortened."""
    caplog.set_level(logging.INFO, "llama_jax.access")
    names = [
        {},
        {"X-Session-ID": "a b"},
        {"x-session-affinity": "c\x7fd"},
        {"X-Session-ID": "e" * 128, "x-session-affinity": "f" * 129},
    ]
    with serving(llm) as client:
        caplog.clear()
        body = {"prompt": QUESTION, "seed": 5, "temperature": 2, "max_tokens": 8}
        answers = [client.post(RUN, json=body, headers=each).json()["result"] for each in names]
    assert len({answer["response"] for answer in answers}) == 1
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    logged = [(line["session_id"], line["session_affinity"]) for line in lines]
    assert logged == [
        (None, None),
        ("a b", None),
        (None, "c\x7fd"),
        ("e" * 128, "f" * 127 + "…"),
    ]


def test_a_person_reads_a_short_line_and_none_for_probes(llm, caplog):
    caplog.set_level(logging.INFO, "llama_jax.access")
    with serving(llm) as client:
        caplog.clear()
        client.post(RUN, json={"prompt": QUESTION, "temperature": 0})
        for path in ("/health", "/healthz", "/readyz", "/metrics"):
            client.get(path)
        client.get("/no%1bsuch%0apath")
    shown = filter(access_log.is_no_probe, caplog.records)
    first, second = map(access_log.ShortFormatter().format, shown)
    assert re.fullmatch(rf"[\d:]{{8}} 200 POST {RUN}  14 \+ 9 tokens  \d+\.\d\d s", first)
    assert " 404 GET /no" in second
    assert second.endswith("error 7000")
    assert second.isprintable(), "a client cannot move the cursor of the terminal"


# Its own description, and its page.


def test_responses_are_as_described(client):
    """For each route and outcome: the status is documented, and the body meets its schema."""
    document = client.get("/openapi.json").json()
    assert document == openapi.document((MODEL,))
    native = "/client/v4/accounts/{account}/ai"
    chat = {"model": MODEL, "messages": [ASKING], "max_tokens": 3}
    scored = {"model": MODEL, "prompt": "x", "logprobs": 2, "echo": True, "max_tokens": 2}
    for method, path, request in [
        ("post", f"{native}/run/{{model}}", {"prompt": "x", "max_tokens": 2, "other": 1}),
        ("post", f"{native}/run/{{model}}", {}),
        ("get", f"{native}/models/search", None),
        ("get", f"{native}/models/schema", None),
        ("get", f"{native}/v1/models", None),
        ("get", "/v1/models/{model}", None),
        ("post", "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2, "x": 1}),
        ("post", "/v1/chat/completions", {**chat, "n": 2}),
        ("post", "/v1/chat/completions", {**chat, "tools": [1]}),
        ("post", "/v1/completions", scored),
        ("post", f"{native}/v1/completions", {"model": MODEL, "prompt": [[1, 5]], "n": 2}),
    ]:
        url = path.replace("{account}", "a").replace("{model}", MODEL)
        params = {"model": MODEL} if path.endswith("schema") else None
        response = client.request(method, url, json=request, params=params)
        described = document["paths"][path][method]["responses"][str(response.status_code)]
        schema = described["content"][response.headers["content-type"]]["schema"]
        schema = {**schema, "components": document["components"]}
        Draft202012Validator(schema).validate(response.json())
    for path, item in document["paths"].items():
        url = path.replace("{account}", "a").replace("{model}", MODEL)
        for method in item:
            response = client.request(method, url)
            assert response.status_code != 405, path
            assert response.status_code != 404 or response.json()["errors"][0]["code"] != 7000, path


def test_page_policy_allows_only_its_own_script_and_style(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"\s(style|on[a-z]+)=\"", response.text), "the policy would stop it"
    html = "<style>\na</style><script type='module'>b</script>"
    policy = page.content_security_policy(html)
    # printf b | openssl sha256 -binary | base64
    assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='" in policy
    assert policy.count("sha256-") == 2


def test_page_names_the_served_model(llm):
    with serving(llm, models=('my "own" model', "b")) as client:
        assert 'data-model="my &quot;own&quot; model"' in client.get("/").text
