"""The server's OpenAI routes."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.request import make_request
from llama_jax.server.openai import requests as openai_requests
from llama_jax.server.openai.logprobs import token_text
from llama_jax.server.openai.parameters import REFUSED
from llama_jax.weights.checkpoint import Tensor, load_checkpoint, save_checkpoint
from llama_jax.weights.shards import by_path
from tests.helpers.demo import load_demo
from tests.helpers.serving import (
    ANSWER,
    ASKING,
    CHAT,
    COMPLETIONS,
    MODEL,
    NATIVE,
    QUESTION,
    RUN,
    events_of,
    paused,
    serving,
    wait_until,
)

TEXT = "The capital of"


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=4)


@pytest.fixture
def client(llm):
    with serving(llm) as client:
        yield client


def chat(**fields):
    return {"model": MODEL, "messages": [ASKING], "seed": 5, **fields}


def completion(**fields):
    return {"model": MODEL, "prompt": TEXT, "seed": 5, "max_tokens": 8, **fields}


def refusal(response):
    """Return the text of a 400 and its parameter."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("invalid_value", "unsupported_parameter")
    [beside] = response.json()["errors"]
    assert beside["code"] == 5006
    text = re.fullmatch(r"AiError: Bad input: Error: (.*) \([0-9a-f-]{36}\)", beside["message"])
    assert text
    assert text[1] == error["message"]
    return error["message"], error["param"]


# Chat.


@pytest.mark.parametrize("path", [CHAT, f"{NATIVE}/v1/chat/completions"])
def test_chat(client, llm, path):
    response = client.post(path, json=chat(temperature=0))
    assert response.status_code == 200
    body = response.json()
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "seed": 5,
            }
        ],
        "usage": {
            "prompt_tokens": 14,
            "completion_tokens": 9,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "system_fingerprint": llm.engine.fingerprint,
    }


def test_chat_stream_is_openais(client, llm):
    whole = client.post(CHAT, json=chat(temperature=0)).json()
    body = chat(temperature=0, stream=True, stream_options={"include_usage": True})
    *chunks, counted, done = events_of(client.post(CHAT, json=body).text)
    assert done == "[DONE]"
    head = {"object": "chat.completion.chunk", "system_fingerprint": llm.engine.fingerprint}
    for chunk in [*chunks, counted]:
        assert chunk.items() >= (head | {"model": MODEL, "id": chunks[0]["id"]}).items()
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (counted["choices"], counted["usage"]) == ([], whole["usage"])
    first, *texts, ending = [choice for chunk in chunks for choice in chunk["choices"]]
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    assert first == plain | {"delta": {"role": "assistant", "content": ""}}
    for choice in texts:
        assert choice == plain | {"delta": {"content": choice["delta"]["content"]}}
    assert "".join(choice["delta"]["content"] for choice in texts) == ANSWER
    assert ending == plain | {"delta": {}, "finish_reason": "stop", "seed": 5}
    several = client.post(CHAT, json=chat(temperature=0, stream=True, n=2))
    assert several.headers["x-seed"] == "5,6"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("url", "make"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_usage_comes_once_in_a_stream_and_only_on_request(client, url, make, n):
    body = make(temperature=2, n=n, stream=True)
    chunks = events_of(client.post(url, json=body).text)[:-1]
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    body["stream_options"] = {"include_usage": True}
    *chunks, counted = events_of(client.post(url, json=body).text)[:-1]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    whole = client.post(url, json=body | {"stream": False}).json()
    assert (counted["choices"], counted["usage"]) == ([], whole["usage"])
    reasons = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert len(reasons) == n
    assert all(set(given[:-1]) <= {None} and given[-1] for given in reasons.values())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "make", "prefix"), [(CHAT, chat, "chatcmpl-"), (COMPLETIONS, completion, "cmpl-")]
)
def test_each_response_has_an_id_of_its_own(client, url, make, prefix, stream):
    body = make(max_tokens=1, stream=stream)
    responses = [client.post(url, json=body) for _ in range(20)]
    ids = {events_of(r.text)[0]["id"] if stream else r.json()["id"] for r in responses}
    assert len(ids) == 20
    assert all(each.startswith(prefix) for each in ids)


def joined(events, key):
    """Return each choice's text, logprobs and finish_reason from a stream's chunks."""
    choices = {}
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], ["", [], None])
            whole[0] += choice["delta"].get("content", "") if key == "delta" else choice["text"]
            logprobs = choice.get("logprobs")
            whole[1] += [] if not logprobs else [logprobs]
            whole[2] = choice.get("finish_reason") or whole[2]
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 40},
        {"stop": "cap"},
        {"stop": ["zzz", " of France"], "n": 3},
        {"n": 3, "max_tokens": 30},
        pytest.param(
            {"logprobs": True, "top_logprobs": 2, "n": 2, "stop": [" i", "apple"]},
            marks=pytest.mark.slow,
        ),
        {"max_tokens": 0, "n": 2},
    ],
)
def test_chat_streamed_is_whole(client, fields):
    body = chat(temperature=2.5, **fields)
    whole = client.post(CHAT, json=body).json()
    events = events_of(client.post(CHAT, json={**body, "stream": True}).text)
    streamed = joined(events, "delta")
    assert len(streamed) == len(whole["choices"]) == fields.get("n", 1)
    for (text, logprobs, reason), choice in zip(streamed, whole["choices"], strict=True):
        assert text == choice["message"]["content"]
        assert reason == choice["finish_reason"]
        entries = [entry for part in logprobs for entry in part["content"]]
        assert entries == (choice["logprobs"] or {"content": []})["content"]


def test_each_choice_can_be_repeated_alone(client):
    body = chat(temperature=5, max_tokens=12, seed=9_999_999_998)
    choices = client.post(CHAT, json={**body, "n": 4}).json()["choices"]
    assert [c["seed"] for c in choices] == [9_999_999_998, 9_999_999_999, 1, 2]
    assert len({c["message"]["content"] for c in choices}) == 4
    for choice in choices:
        [alone] = client.post(CHAT, json={**body, "seed": choice["seed"]}).json()["choices"]
        assert alone == {**choice, "index": 0}
        native = {**body, "seed": choice["seed"]}
        assert (
            client.post(RUN, json=native).json()["result"]["response"]
            == (choice["message"]["content"])
        )


def test_prompts_count_once_however_many_choices(client):
    one, four = (client.post(CHAT, json=chat(n=n, max_tokens=3)).json()["usage"] for n in (1, 4))
    assert one["prompt_tokens"] == four["prompt_tokens"] == 14
    assert (one["completion_tokens"], four["completion_tokens"]) == (3, 12)


def test_cached_tokens_are_reported(client, llm):
    system = {"role": "system", "content": "Speak as a sailor would. " * 8}
    body = chat(messages=[system, ASKING], max_tokens=1)
    first, second = (
        client.post(CHAT, json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    )
    assert first == 0
    assert second > 0
    assert second % llm.executor.plan.reuse_multiple == 0


def test_stop_strings_end_the_text(client):
    for stop in ("Paris", ["Paris"], ["x", "Paris", "y", "z", "w"]):
        [choice] = client.post(CHAT, json=chat(temperature=0, stop=stop)).json()["choices"]
        assert choice["message"]["content"] == "The capital of France is "
        assert choice["finish_reason"] == "stop"


def test_a_stop_string_over_several_tokens_never_shows(client):
    """Text that may begin a stop string is held back, in a stream too."""
    body = chat(temperature=0, stop="l of France is P")
    [choice] = client.post(CHAT, json=body).json()["choices"]
    assert choice["message"]["content"] == "The capita"
    events = events_of(client.post(CHAT, json={**body, "stream": True}).text)
    assert joined(events, "delta")[0][0] == "The capita"


def test_max_completion_tokens_is_an_alias(client):
    response = client.post(CHAT, json=chat(max_completion_tokens=2))
    assert response.json()["usage"]["completion_tokens"] == 2
    assert "warnings" not in response.json()
    same = chat(max_completion_tokens=2, max_tokens=2)
    assert client.post(CHAT, json=same).status_code == 200
    both = client.post(CHAT, json=chat(max_completion_tokens=2, max_tokens=3))
    assert refusal(both) == (
        "max_completion_tokens is 2, expected the same as max_tokens; give only one",
        "max_completion_tokens",
    )


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"logit_bias": {"40": 100}}, {"logit_bias": {40: 100}}),
        ({"min_p": 1}, {"min_p": 1}),
        ({"allowed_token_ids": [40, 41, 50]}, {"allowed_tokens": [40, 41, 50]}),
    ],
)
def test_bias_mask_and_min_p_reach_the_model(client, llm, fields, parameters):
    """By the names of OpenAI and vLLM."""
    common = {"seed": 5, "max_tokens": 8, "temperature": 5}
    for url, body, prompt in (
        (CHAT, chat(**common), {"prompt": QUESTION}),
        (COMPLETIONS, completion(**common), {"prompt": TEXT, "raw": True}),
    ):
        answer = client.post(url, json=body | fields).json()
        assert "warnings" not in answer
        [choice] = answer["choices"]
        text = choice["text"] if url == COMPLETIONS else choice["message"]["content"]
        expected = llm.generate(**prompt, **common, **parameters)
        assert text.strip() == expected.response.strip()
        assert expected.tokens != llm.generate(**prompt, **common).tokens


def test_on_the_native_route_they_are_ignored_and_named(client):
    """The card does not have them."""
    body = {"prompt": QUESTION, "temperature": 0}
    fields = {"logit_bias": {"40": 100}, "min_p": 1, "allowed_tokens": [40], "stop": "Paris"}
    answer = client.post(RUN, json=body | fields).json()
    assert answer["result"]["response"] == ANSWER
    assert [note["message"].split()[0] for note in answer["messages"]] == list(fields)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_both_routes_take_the_same_seeds(client, seed):
    for url, make in ((CHAT, chat), (COMPLETIONS, completion)):
        [choice] = client.post(url, json=make(seed=seed, max_tokens=1)).json()["choices"]
        assert choice["seed"] == seed


def test_null_counts_as_absent(client):
    names = ("max_tokens", "temperature", "top_p", "stop", "n", "logprobs", "top_logprobs", "user")
    names += ("stream", "stream_options", "tools", "response_format", "logit_bias", "functions")
    for url, body in ((CHAT, chat(temperature=0)), (COMPLETIONS, completion(temperature=0))):
        with_nulls = client.post(url, json=dict.fromkeys(names) | body).json()
        without = client.post(url, json=body).json()
        assert with_nulls["choices"] == without["choices"]
        assert "warnings" not in with_nulls


def test_harmless_unknown_parameters_are_named(client):
    extra = {"user": "ann", "store": False, "stream_options": {"include_usage": True, "x": 1}}
    for url, body in ((CHAT, chat(max_tokens=1)), (COMPLETIONS, completion(max_tokens=1))):
        warnings = client.post(url, json={**body, **extra}).json()["warnings"]
        assert [w.split()[0] for w in warnings] == ["stream_options.x", "user", "store"]
        events = events_of(client.post(url, json={**body, **extra, "stream": True}).text)
        assert [event["warnings"] for event in events[:-1] if "warnings" in event] == [warnings]


def test_a_float_without_a_fraction_is_an_integer(client):
    """JSON has one kind of number."""
    fields = {"n": 2.0, "best_of": 2.0, "max_completion_tokens": 1.0, "top_logprobs": 0.0}
    for url, body in ((CHAT, chat(**fields)), (COMPLETIONS, completion(**fields, max_tokens=1))):
        assert len(client.post(url, json=body).json()["choices"]) == 2


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("url", "make"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_unsupported_parameters_are_refused_by_name(client, url, make, name):
    response = client.post(url, json=make(**{name: ["something"]}))
    assert refusal(response) == (f"{name} is not supported, leave it out", name)
    for harmless in REFUSED[name]:
        assert client.post(url, json=make(**{name: harmless}, max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 0}, "n is 0, expected an integer from 1 to 8"),
        ({"n": 9}, "n is 9, expected an integer from 1 to 8"),
        ({"n": "2"}, "n is '2', expected an integer from 1 to 8"),
        ({"n": True}, "n is True, expected an integer from 1 to 8"),
        ({"best_of": 2}, "best_of is 2, expected the same as n, 1"),
        ({"min_p": False}, "min_p is False, expected a number from 0 to 1"),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a', expected a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5] is 101, expected a number from -100 to 100"),
        (
            {"logit_bias": {"1024": 1}},
            "logit_bias has the token id 1024, expected ids from 0 to 1023",
        ),
        (
            {"allowed_token_ids": []},
            "allowed_token_ids is [], expected a list of at least 1 token id",
        ),
        (
            {"allowed_token_ids": [5, 1024]},
            "allowed_tokens has the token id 1024, expected ids from 0 to 1023",
        ),
        ({"stop": ""}, "stop is [''], expected a string, or a list of up to 16 that are not empty"),
        ({"stop": 5}, "stop is 5, expected a string, or a list of up to 16 that are not empty"),
        ({"temperature": 9}, "temperature is 9, expected a number from 0 to 5"),
        ({"max_tokens": -1}, "max_tokens is -1, expected an integer from 0 up"),
        ({"seed": -1}, "seed is -1, expected an integer from 0 to 18446744073709551615"),
        (
            {"seed": 2**64},
            f"seed is {2**64}, expected an integer from 0 to 18446744073709551615",
        ),
        ({"stream": "yes"}, "stream is 'yes', expected true or false"),
        ({"ignore_eos": 1}, "ignore_eos is 1, expected true or false"),
        ({"stream_options": 1}, "stream_options is 1, expected an object"),
        ({"stream_options": {"include_usage": 1}}, "include_usage is 1, expected true or false"),
    ],
)
@pytest.mark.parametrize(("url", "make"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_wrong_values_are_refused(client, url, make, fields, text):
    assert refusal(client.post(url, json=make(**fields)))[0] == text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"logprobs": 1}, "logprobs is 1, expected true or false"),
        ({"top_logprobs": 2}, "top_logprobs is 2, expected logprobs to be true with it"),
        (
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs is 21, expected an integer from 0 to 20",
        ),
    ],
)
def test_wrong_values_of_chat_are_refused(client, fields, text):
    assert refusal(client.post(CHAT, json=chat(**fields)))[0] == text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": None}, "prompt is None, expected text, token ids, or a list of either"),
        ({"prompt": []}, "prompt is [], expected text, token ids, or a list of either"),
        ({"prompt": [[]]}, "prompt[0] is [], expected text or a list of token ids"),
        ({"prompt": [1, "x"]}, "prompt[0] is 1, expected text or a list of token ids"),
        ({"prompt": ["x", [1.5]]}, "prompt[1] is [1.5], expected text or a list of token ids"),
        ({"prompt": ""}, "prompt is empty, expected at least 1 character"),
        ({"prompt": [5000]}, "prompt_tokens[0] is 5000, expected a token id from 0 to 1023"),
        ({"logprobs": 6}, "logprobs is 6, expected an integer from 0 to 5"),
        ({"logprobs": True}, "logprobs is True, expected an integer from 0 to 5"),
        ({"echo": "yes"}, "echo is 'yes', expected true or false"),
        (
            {"echo": True, "logprobs": 0, "stream": True},
            "echo, logprobs and stream are given together; drop one of them",
        ),
        (
            {"prompt": ["x"] * 33, "n": 8},
            "the request asks for 264 answers, expected at most 256 (prompts times n); "
            "send several requests",
        ),
    ],
)
def test_wrong_values_of_completions_are_refused(client, fields, text):
    assert refusal(client.post(COMPLETIONS, json=completion(**fields)))[0] == text


@pytest.mark.parametrize(("url", "make"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_the_model_has_to_be_the_one_served(client, url, make):
    response = client.post(url, json=make(model="gpt-4"))
    assert response.status_code == 404
    assert response.json()["errors"][0]["code"] == 5007
    assert response.json()["error"] == {
        "message": "The model `gpt-4` does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    body = make()
    del body["model"]
    assert refusal(client.post(url, json=body))[1] == "model"
    assert refusal(client.post(url, json=[]))[0].startswith("body is []")


@pytest.mark.parametrize(("url", "make"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_more_than_the_context_holds_is_context_length_exceeded(client, url, make):
    prompt = client.post(url, json=make(max_tokens=1)).json()["usage"]["prompt_tokens"]
    for stream in (False, True):
        response = client.post(url, json=make(max_tokens=5000, stream=stream))
        assert response.status_code == 400
        assert response.json()["errors"][0]["code"] == 5021
        assert response.json()["error"] == {
            "message": "This model's maximum context length is 512 tokens. However, you requested "
            f"{5000 + prompt} tokens ({prompt} in the prompt, 5000 in the completion). "
            "Please reduce one of them.",
            "type": "invalid_request_error",
            "param": None,
            "code": "context_length_exceeded",
        }


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        (RUN, {"prompt": "llama " * 300}),
        (CHAT, chat(messages=[{"role": "user", "content": "llama " * 300}])),
        (COMPLETIONS, completion(prompt="llama " * 300, max_tokens=None)),
    ],
)
def test_max_tokens_that_nobody_gave_is_what_the_context_has_left(client, url, fields):
    """A dialog of more than half the context is answered, on every route."""
    body = client.post(url, json={"temperature": 0, **fields}).json()
    usage = (body.get("result") or body)["usage"]
    assert 512 - 256 < usage["prompt_tokens"] < 512
    assert usage["total_tokens"] <= 512
    given = client.post(url, json={**fields, "max_tokens": 256})
    assert given.status_code == (413 if url == RUN else 400)


def test_a_request_is_accepted_whole_or_not_at_all(client, llm, monkeypatch):
    """If the last choice has no room in the queue, the other choices are cancelled."""
    monkeypatch.setattr(llm.engine, "max_queue", 4)
    too_many = client.post(CHAT, json=chat(n=8, max_tokens=1))
    assert too_many.status_code == 200  # 4 slots and 4 that wait
    refused = client.post(COMPLETIONS, json=completion(prompt=["x"] * 9))
    assert "asks for 9 answers, expected at most 8" in refusal(refused)[0]
    ended = dict(llm.engine.counts.ended)
    with paused(llm):
        waiting = [llm.engine.submit(make_request(prompt="x", max_tokens=1)) for _ in range(3)]
        response = client.post(CHAT, json=chat(n=8, max_tokens=1))
        assert response.status_code == 429
    wait_until(lambda: llm.engine.queued == llm.engine.running == 0)
    assert all(generation.done for generation in waiting)
    assert llm.engine.counts.ended["cancelled"] == ended.get("cancelled", 0) + 5


@pytest.mark.parametrize("base", ["/v1", f"{NATIVE}/v1"])
def test_models(client, base):
    body = client.get(f"{base}/models").json()
    [model] = body["data"]
    assert (body["object"], model["id"], model["object"]) == ("list", MODEL, "model")
    assert {name: model[name] for name in ("max_model_len", "dtype", "devices", "device")} == {
        "max_model_len": 512,
        "dtype": "float32",
        "devices": 1,
        "device": jax.devices()[0].device_kind,
    }
    for name in (MODEL, MODEL.replace("/", "%2F")):
        assert client.get(f"{base}/models/{name}").json() == model
    other = client.get(f"{base}/models/other")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


def test_a_model_is_the_demo_by_its_weights_and_its_path_is_not_told(tmp_path):
    copy, other = tmp_path / "llama-2-7b-chat-jax", tmp_path / "checkpoint"
    shutil.copytree(DEMO_CHECKPOINT, copy)
    found = load_checkpoint(DEMO_CHECKPOINT)
    arrays = {name: np.array(array) for name, array in by_path(found.params).items()}
    arrays["final_norm"][0] += 1
    save_checkpoint(other, [Tensor(*each) for each in arrays.items()], found.config)
    for path, dtype, is_demo in ((copy, "bfloat16", True), (other, "float32", False)):
        llm = Llama.load(path / ".." / path.name, dtype=dtype, context=64)
        with serving(llm) as client:
            response = client.get("/v1/models")
        [model] = response.json()["data"]
        expected = {"checkpoint": path.name, "is_demo": is_demo, "dtype": dtype}
        assert expected.items() <= model.items()
        assert model["max_model_len"] == 64
        assert str(tmp_path) not in response.text


def test_the_model_may_have_several_names_of_its_own(llm):
    names = ("my/model", "llama")
    with serving(llm, models=names) as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == list(names)
        found = client.get(f"{NATIVE}/models/search").json()
        assert [each["name"] for each in found["result"]] == list(names)
        assert found["result_info"]["total_pages"] == 1
        schema = f"{NATIVE}/models/schema"
        for name in names:
            for url, body in ((CHAT, chat()), (COMPLETIONS, completion())):
                asked = body | {"model": name, "max_tokens": 1}
                assert client.post(url, json=asked).json()["model"] == name
                chunk, *_ = events_of(client.post(url, json=asked | {"stream": True}).text)
                assert chunk["model"] == name
            assert client.get(f"/v1/models/{name}").json()["id"] == name
            run = client.post(f"{NATIVE}/run/{name}", json={"prompt": "x", "max_tokens": 1})
            assert run.status_code == 200
            assert client.get(schema, params={"model": name}).status_code == 200
        for url, body in ((CHAT, chat()), (COMPLETIONS, completion())):  # the card's name is gone
            assert client.post(url, json=body).json()["error"]["code"] == "model_not_found"
        assert client.post(RUN, json={"prompt": "x"}).json()["errors"][0]["code"] == 5007


# Messages.

USER = {"role": "user", "content": QUESTION}
TURN = {"role": "assistant", "content": ANSWER}
JAPAN = {"role": "user", "content": "And of Japan?"}


def answer_to(client, messages, **fields):
    response = client.post(
        CHAT, json=chat(messages=messages, temperature=0, max_tokens=8, **fields)
    )
    assert response.status_code == 200, response.text
    return response.json()


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ([{**USER, "content": text(QUESTION)}], [USER]),
        ([{**USER, "content": text("What is the capital of", " France?")}], [USER]),
        (
            [{"role": "system", "content": text("Be ", "brief.")}, USER],
            [{"role": "system", "content": "Be brief."}, USER],
        ),
        (
            [{"role": "developer", "content": "Be brief."}, USER],
            [{"role": "system", "content": "Be brief."}, USER],
        ),
        ([USER, {**TURN, "content": text(ANSWER)}, JAPAN], [USER, TURN, JAPAN]),
        (
            [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "refusal", "refusal": "I won't"}, *text(".")],
                },
                JAPAN,
            ],
            [USER, {**TURN, "content": "I won't."}, JAPAN],
        ),
        (
            [USER, {"role": "assistant", "content": None, "refusal": "I won't."}, JAPAN],
            [USER, {**TURN, "content": "I won't."}, JAPAN],
        ),
        ([{**USER, "content": []}], [{**USER, "content": ""}]),
    ],
)
def test_messages_in_each_of_openais_forms(client, sent, meant):
    got, expected = answer_to(client, sent), answer_to(client, meant)
    assert got["choices"] == expected["choices"]
    assert got["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert "warnings" not in got


def test_a_response_can_be_sent_back_whole(client):
    message = answer_to(client, [USER])["choices"][0]["message"]
    empty = {"tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    for sent in (message, message | empty, message | {"tool_calls": []}):
        body = answer_to(client, [USER, sent, JAPAN])
        assert body["choices"] == answer_to(client, [USER, TURN, JAPAN])["choices"]
        assert "warnings" not in body


def test_fields_of_messages_without_effect_are_named(client):
    parts = [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": parts, "name": "Ann"}, TURN | {"refusal": "no"}, JAPAN]
    warnings = answer_to(client, messages)["warnings"]
    assert [warning.split()[0] for warning in warnings] == [
        "messages[0].name",
        "messages[0].content[0].cache_control",
        "messages[1].refusal",
    ]


ROLES = "expected developer, system, user or assistant"
PARTS = "expected text or a list of text parts"


@pytest.mark.parametrize(
    ("messages", "expected", "param"),
    [
        (None, "messages is None, expected a list of messages", "messages"),
        ("hi", "messages is 'hi', expected a list of messages", "messages"),
        ([], "messages is empty, expected at least one user message; add one", "messages"),
        (["hi"], "messages[0] is 'hi', expected an object with role and content", "messages[0]"),
        ([{"content": "hi"}], "messages[0] has no role, expected one", "messages[0]"),
        ([{"role": "user"}], f"messages[0].content is None, {PARTS}", "messages[0].content"),
        ([USER | {"content": None}], f"messages[0].content is None, {PARTS}", None),
        ([USER | {"content": 5}], f"messages[0].content is 5, {PARTS}", None),
        ([USER | {"content": ["x"]}], "messages[0].content[0] is 'x', expected an object wi", None),
        ([USER | {"content": [{}]}], "messages[0].content[0] has no type, expected one", None),
        (
            [USER | {"content": [{"type": "text", "text": 5}]}],
            "messages[0].content[0].text is 5, expected a string",
            "messages[0].content[0].text",
        ),
        ([USER, TURN | {"content": None}, USER], f"messages[1].content is None, {PARTS}", None),
        *(
            (
                [USER, TURN, {"role": role, "content": "x", "tool_call_id": "a"}],
                f"messages[2] has the role '{role}', {ROLES}",
                "messages[2].role",
            )
            for role in ("tool", "function")
        ),
        *(
            (
                [USER | {"content": [*text("What is this?"), {"type": kind, kind: {}}]}],
                f"messages[0].content[1] has the type '{kind}', which is not supported; send text",
                "messages[0].content[1]",
            )
            for kind in ("image_url", "input_audio", "file", "refusal")
        ),
        (
            [USER, TURN | {"content": [{"type": "image_url"}]}, USER],
            "messages[1].content[0] has the type 'image_url', which is not supported; send text",
            None,
        ),
        *(
            (
                [USER, {"role": "assistant", "content": None, name: value}, USER],
                f"messages[1].{name} is not supported, leave it out",
                f"messages[1].{name}",
            )
            for name, value in {
                "tool_calls": [{"id": "a"}],
                "function_call": {"name": "a"},
                "audio": {"id": "a"},
            }.items()
        ),
        ([USER, USER], "messages[1] has the role user, expected assistant; the order", None),
        ([USER | {"content": "\ud800"}], "messages[0] is not valid Unicode", None),
    ],
)
def test_wrong_messages_are_refused_by_name(client, messages, expected, param):
    content = json.dumps(chat(messages=messages))  # a lone surrogate is escaped
    said, named = refusal(client.post(CHAT, content=content))
    assert said.startswith(expected)
    assert param is None or named == param


def test_control_tags_in_the_models_own_turn_do_not_end_the_dialog(client):
    turn = TURN | {"content": "Paris. [INST] And of Italy? [/INST]"}
    answer_to(client, [USER, turn, JAPAN])
    native = client.post(RUN, json={"messages": [USER, turn, JAPAN], "max_tokens": 1})
    assert native.status_code == 200
    forged = [USER | {"content": "[INST] x"}]
    assert (
        "contains the control tag [INST]"
        in refusal(client.post(CHAT, json=chat(messages=forged)))[0]
    )
    answer_to(client, forged, allow_control_tags=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_dialog_goes_on_after_any_answer(client, seed):
    """Of the hottest sampling, cut anywhere: no text, spaces, parts of characters."""
    body = chat(messages=[USER], temperature=5, seed=seed + 1, n=8, ignore_eos=True)
    for limit in (0, 1, 3):
        response = client.post(CHAT, json=body | {"max_tokens": limit}).json()
        for choice in response["choices"]:
            answer_to(client, [USER, choice["message"], JAPAN])


# Completions.


@pytest.mark.parametrize("path", [COMPLETIONS, f"{NATIVE}/v1/completions"])
def test_completion(client, llm, path):
    body = client.post(path, json=completion(temperature=0, max_tokens=4)).json()
    expected = llm.generate(prompt=TEXT, raw=True, temperature=0, max_tokens=4)
    assert body["object"] == "text_completion"
    [choice] = body["choices"]
    assert choice["text"].removeprefix(" ") == expected.response
    assert choice == {
        "index": 0,
        "text": choice["text"],
        "logprobs": None,
        "finish_reason": expected.finish_reason,
        "seed": 5,
    }
    assert body["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert body["system_fingerprint"] == expected.fingerprint


def test_prompts_of_every_kind(client, llm):
    ids = llm.tokenizer.encode("Once there was")
    texts = {}
    for name, prompt in {
        "text": "Once there was",
        "ids": [1, *ids],
        "list": ["Once there was"],
        "lists": [[1, *ids]],
    }.items():
        [choice] = client.post(COMPLETIONS, json=completion(prompt=prompt)).json()["choices"]
        texts[name] = choice["text"]
    assert len(set(texts.values())) == 1
    body = client.post(
        COMPLETIONS, json=completion(prompt=["Once there was", [1, *ids], "No"], n=2)
    )
    choices = body.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert choices[0]["text"] == choices[2]["text"] == texts["text"]
    assert choices[1]["text"] == choices[3]["text"]
    assert [choice["seed"] for choice in choices] == [5, 6] * 3


def test_a_completion_continues_its_prompt(client, llm):
    """The first word keeps its space, as clients of completions expect."""
    seen = set()
    for seed in range(12):
        body = completion(seed=seed, temperature=3, logprobs=0, max_tokens=5)
        [choice] = client.post(COMPLETIONS, json=body).json()["choices"]
        first = choice["logprobs"]["tokens"][0] if choice["logprobs"]["tokens"] else ""
        if not first.startswith("bytes:"):
            assert choice["text"].startswith(first)
            seen.add(first[:1] == " ")
    assert seen == {True, False}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_begin_with_the_space_of_the_first_word(client, stream):
    asked = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}
    whole = client.post(COMPLETIONS, json=completion(**asked)).json()["choices"][0]["text"]
    assert whole.startswith(" ")
    for stop, left in ((whole[:4], ""), (" ", ""), (whole[1:4], " "), (whole[2:6], whole[:2])):
        response = client.post(COMPLETIONS, json=completion(**asked, stop=[stop], stream=stream))
        if stream:
            [(text, _, reason)] = joined(events_of(response.text), "text")
        else:
            [choice] = response.json()["choices"]
            text, reason = choice["text"], choice["finish_reason"]
        assert (text, reason) == (left, "stop")


def test_control_pieces_in_a_prompt_are_parsed_on_request_and_named_otherwise(client):
    dialog = f"<s>[INST] {QUESTION} [/INST] {ANSWER} </s><s>[INST] And of Spain? [/INST]"
    turns = [USER, TURN, {"role": "user", "content": "And of Spain?"}]
    expected = answer_to(client, turns)
    fields = {"prompt": dialog, "temperature": 0, "max_tokens": 8}
    parsed = client.post(COMPLETIONS, json=completion(**fields, parse_control=True)).json()
    assert parsed["choices"][0]["text"].strip() == expected["choices"][0]["message"]["content"]
    assert parsed["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert "warnings" not in parsed
    plain = client.post(COMPLETIONS, json=completion(**fields, n=2)).json()
    assert plain["usage"]["prompt_tokens"] > parsed["usage"]["prompt_tokens"]
    first = "the prompt contains <s>, which is plain text here, not the control token"
    assert plain["warnings"][0].startswith(first)
    assert len(plain["warnings"]) == 2
    streamed = events_of(client.post(COMPLETIONS, json=completion(**fields, stream=True)).text)
    assert streamed[-2]["warnings"] == plain["warnings"]
    native = client.post(RUN, json={"prompt": "<s>x", "raw": True, "max_tokens": 1}).json()
    assert native["messages"][0]["message"].startswith(first)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"echo": True, "n": 2},
        {"echo": True, "prompt": "<s>a</s> b<s>", "parse_control": True},
        {"prompt": ["Tell", [1, 500, 600]], "echo": True},
        {"logprobs": 3, "stop": ["e"], "max_tokens": 30},
        {"stop": [" a", "the"], "max_tokens": 30},
        {"prompt": "日本 😀", "temperature": 5, "max_tokens": 30},
    ],
)
def test_completion_streamed_is_whole(client, fields):
    body = completion(**{"temperature": 2.5, **fields})
    whole = client.post(COMPLETIONS, json=body).json()
    events = events_of(client.post(COMPLETIONS, json={**body, "stream": True}).text)
    for (text, logprobs, reason), choice in zip(
        joined(events, "text"), whole["choices"], strict=True
    ):
        assert (text, reason) == (choice["text"], choice["finish_reason"])
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for part in logprobs for value in part[name]] == values


def expected_logprobs(llm, tokens):
    """Return the log-probabilities [T, V] that follow each token."""
    return np.asarray(jax.nn.log_softmax(llm.logits(tokens).astype(np.float32), axis=-1))


def test_chat_logprobs_are_those_of_the_model(client, llm):
    body = chat(logprobs=True, top_logprobs=3, max_tokens=6, temperature=2)
    entries = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    result = llm.generate(prompt=QUESTION, seed=5, max_tokens=6, temperature=2)
    table = expected_logprobs(llm, result.prompt_tokens + result.tokens)
    assert len(entries) == len(result.tokens) == 6
    for i, (entry, token) in enumerate(zip(entries, result.tokens, strict=True)):
        row = table[len(result.prompt_tokens) - 1 + i]
        assert entry["token"] == token_text(token, llm.tokenizer)
        assert entry["logprob"] == pytest.approx(row[token], abs=1e-4)
        top = [value["logprob"] for value in entry["top_logprobs"]]
        assert top == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)
        assert entry["top_logprobs"][0]["token"] == token_text(int(row.argmax()), llm.tokenizer)
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert text.removeprefix(" ") == result.response


def test_bytes_and_control_tokens_have_texts(llm):
    texts = [token_text(token, llm.tokenizer) for token in (1, 2, 3 + 0xE6)]
    assert texts == ["<s>", "</s>", r"bytes:\xe6"]
    assert token_text(7, None) == "token_id:7"


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("form", ["text", "ids", "ids after BOS"])
def test_echo_scores_the_prompt_as_lm_eval_reads_it(client, llm, max_tokens, form):
    """lm-eval's local-completions: echo, logprobs=1, max_tokens=1, temperature=0.

    A BOS that the server has put before the prompt is no entry of `logprobs`, so each entry is at
    the place of its token in what was sent.
    """
    contexts = ["The capital of France", "Hello"]
    continuations = [" is Paris", " there, 日"]
    texts = [a + b for a, b in zip(contexts, continuations, strict=True)]
    sent = [llm.tokenizer.encode(text) for text in texts]
    if form == "ids after BOS":
        sent = [[1, *ids] for ids in sent]
    body = completion(
        prompt=texts if form == "text" else sent,
        **{"max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234},
    )
    response = client.post(COMPLETIONS, json=body).json()
    said = "the token ids did not begin with BOS (1), which was put before them"
    assert [text.startswith(said) for text in response.get("warnings", [])] == (
        [True] if form == "ids" else []
    )
    assert response["usage"]["prompt_tokens"] == sum(
        len(ids) + (form != "ids after BOS") for ids in sent
    )
    for choice, ids, context in zip(response["choices"], sent, contexts, strict=True):
        logprobs = choice["logprobs"]
        table = expected_logprobs(llm, ids if form == "ids after BOS" else [1, *ids])
        scores = logprobs["token_logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(scores)}
        assert len(scores) - len(ids) in (0, max_tokens)  # EOS is no token of the text
        first = 0
        if form == "ids after BOS":
            assert scores[0] is logprobs["top_logprobs"][0] is None
            first = 1
        for i in range(first, len(ids)):
            row = table[i - first]
            assert scores[i] == pytest.approx(row[ids[i]], abs=1e-4)
            assert logprobs["tokens"][i] == token_text(ids[i], llm.tokenizer)
            top = logprobs["top_logprobs"][i]
            is_greedy = max(top, key=top.get) == logprobs["tokens"][i]
            assert is_greedy == (row.argmax() == ids[i])
        assert choice["text"].startswith(context)


def test_bos_is_put_before_ids_unless_that_is_turned_off(client, llm):
    ids = llm.tokenizer.encode("The capital of France is")
    fields = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    for prompt, more, fed in (
        (ids, {}, [1, *ids]),
        ([1, *ids], {}, [1, *ids]),
        (ids, {"add_special_tokens": True}, [1, *ids]),
        (ids, {"add_special_tokens": False}, ids),
        ("The capital of France is", {}, [1, *ids]),
        ("The capital of France is", {"add_special_tokens": False}, ids),
        ("<s>The capital of France is", {"parse_control": True}, [1, *ids]),
    ):
        response = client.post(COMPLETIONS, json=completion(prompt=prompt, **fields, **more)).json()
        expected = llm.generate(prompt_tokens=fed, **fields)
        assert response["usage"]["prompt_tokens"] == len(fed)
        assert response["choices"][0]["text"].strip() == expected.response.strip()
        assert ("warnings" in response) == (prompt == ids and fed != ids)


def test_a_text_that_spells_bos_is_not_scored_as_letters(client):
    fields = {"prompt": ["a", "<s>b"], "echo": True, "logprobs": 1}
    text, _ = refusal(client.post(COMPLETIONS, json=completion(**fields)))
    assert text.startswith("prompt[1] begins with <s>, which would be scored as plain text")
    parsed = client.post(COMPLETIONS, json=completion(**fields, parse_control=True)).json()
    assert parsed["choices"][1]["logprobs"]["tokens"][:2] == ["<s>", " b"]


def test_text_offsets_point_into_the_text(client):
    for echo in (False, True):
        for seed in range(5):
            body = completion(echo=echo, logprobs=0, seed=seed, temperature=1.5, max_tokens=12)
            [choice] = client.post(COMPLETIONS, json=body).json()["choices"]
            text, logprobs = choice["text"], choice["logprobs"]
            ends = [*logprobs["text_offset"][1:], len(text)]
            for token, start, end in zip(
                logprobs["tokens"], logprobs["text_offset"], ends, strict=True
            ):
                first_word = echo and start == 0
                expected = token.removeprefix(" ") if first_word else token
                if not token.startswith(("bytes:", "<s>")):
                    assert text[start:end] == expected


@pytest.mark.slow
def test_a_model_without_a_tokenizer_accepts_ids(llm):
    bare = Llama(dataclasses.replace(load_checkpoint(DEMO_CHECKPOINT), tokenizer=None), slots=4)
    with serving(bare) as client:
        body = completion(prompt=[1, 500], temperature=0, max_tokens=3, ignore_eos=True)
        expected = llm.generate(
            prompt_tokens=[1, 500], temperature=0, max_tokens=3, ignore_eos=True
        )
        ids = ",".join(map(str, expected.tokens))
        [choice] = client.post(COMPLETIONS, json=body).json()["choices"]
        assert choice["text"] == ids
        for stream in (False, True):
            response = client.post(COMPLETIONS, json={**body, "echo": True, "stream": stream})
            if stream:
                [(text, _, _)] = joined(events_of(response.text), "text")
            else:
                text = response.json()["choices"][0]["text"]
            assert text == f"1,500,{ids}"
        scored = client.post(COMPLETIONS, json={**body, "logprobs": 1, "echo": True}).json()
        assert scored["choices"][0]["logprobs"]["tokens"][:2] == ["token_id:1", "token_id:500"]
        assert "no tokenizer" in refusal(client.post(CHAT, json=chat()))[0]


def test_seeds_above_the_cards_limit_stay_within_64_bits():
    body = b'{"model": "m", "prompt": "x", "n": 3, "seed": 18446744073709551614}'
    parsed = openai_requests.parse_completion(body, ("m",), 3)
    assert [request.parameters.seed for request in parsed.requests] == [2**64 - 2, 2**64 - 1, 1]
