"""Fuzz tests: every response is as the OpenAPI document describes it, and never a 500."""

import functools
import json
import subprocess
import sys
import time

import hypothesis
import pytest
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server.openai.parameters import IGNORED, REFUSED
from llama_jax.server.openapi import document as openapi
from tests.helpers.server_process import TOKEN, served
from tests.helpers.serving import CHAT, COMPLETIONS, MODEL, NATIVE, RUN, serving

pytestmark = pytest.mark.slow

DEADLINE_S = 5
DOCUMENT = openapi.document((MODEL,))
PATHS = {
    RUN: "/client/v4/accounts/{account}/ai/run/{model}",
    CHAT: "/v1/chat/completions",
    COMPLETIONS: "/v1/completions",
    f"{NATIVE}/v1/chat/completions": "/client/v4/accounts/{account}/ai/v1/chat/completions",
    f"{NATIVE}/v1/completions": "/client/v4/accounts/{account}/ai/v1/completions",
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
VALID = {
    RUN: [{"prompt": "hi", "max_tokens": 2}, {"messages": MESSAGES, "max_tokens": 2}],
    CHAT: [{"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "n": 2, "logprobs": True}],
    COMPLETIONS: [
        {"model": MODEL, "prompt": "hi", "max_tokens": 2, "echo": True, "logprobs": 2},
        {"model": MODEL, "prompt": [[1, 5], [1, 6]], "max_tokens": 2, "stop": ["x"]},
    ],
}
VALID |= {f"{NATIVE}{path}": VALID[path] for path in (CHAT, COMPLETIONS)}
NAMES = sorted(
    {
        *("prompt", "messages", "role", "content", "stream", "raw", "max_tokens", "temperature"),
        *("top_p", "top_k", "seed", "repetition_penalty", "frequency_penalty", "model", "n"),
        *("presence_penalty", "stop", "ignore_eos", "logprobs", "top_logprobs", "echo"),
        *("min_p", "logit_bias", "allowed_token_ids"),
        *("max_completion_tokens", "stream_options", "best_of", "functions", "lora", "user"),
        *REFUSED,
        *IGNORED,
        *("type", "text", "refusal", "tool_calls", "allow_control_tags", "parse_control"),
    }
)


@pytest.fixture(scope="module")
def llm():
    return Llama.load(DEMO_CHECKPOINT, slots=4, context=128)


@pytest.fixture(scope="module")
def client(llm):
    with serving(llm, max_body_bytes=1 << 20) as client:
        for path, bodies in VALID.items():
            for body in bodies:  # compiled now, so that deadlines do not include compilation
                for stream in (False, True):
                    fields = {"stream": stream} | ({"logprobs": None} if stream else {})
                    assert client.post(path, json=body | fields).status_code == 200
        yield client


def check(client, path, content):
    """Send any bytes; check that the response is as described, in time, and not a 500."""
    began = time.monotonic()
    response = client.post(path, content=content)
    assert time.monotonic() - began < DEADLINE_S
    assert response.status_code in (200, 400, 404, 413), response.text
    kind = response.headers["content-type"].split(";")[0]
    if kind == "text/event-stream":
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n")
        return
    assert kind == "application/json"
    body = response.json()
    validator(path, response.status_code).validate(body)
    if response.status_code != 200:
        [error] = body["errors"]
        if path == RUN:
            assert error["message"] == body["error"]["message"]
            assert str(error["code"]) == body["error"]["code"]


@functools.cache
def validator(path, status):
    """Return the validator of a route's responses with a status."""
    described = DOCUMENT["paths"][PATHS[path]]["post"]["responses"][str(status)]
    schema = described["content"]["application/json"]["schema"]
    return Draft202012Validator(schema | {"components": DOCUMENT["components"]})


def test_response_schemas_admit_no_undescribed_fields():
    requests = {"RunRequest", "ChatRequest", "CompletionRequest", "StreamOptions"}
    requests |= {"TokenizeRequest", "DetokenizeRequest"}
    requests |= {"QueueRequest", "BatchRequest", "ExpiresAfter"}
    requests |= {"SystemMessage", "UserMessage", "AssistantMessage", "TextPart", "RefusalPart"}
    receipts = {"Receipt", "Statement", "Envelope"}  # whose readers ignore what they do not know
    for name, schema in DOCUMENT["components"]["schemas"].items():
        assert name in requests | receipts or schema["additionalProperties"] is False, name


def fuzzed(examples):
    """Return a decorator that draws paths and data."""
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,  # `check` has its own, for the response alone
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    return lambda test: settings(
        hypothesis.given(path=st.sampled_from(list(PATHS)), data=st.data())(test)
    )


numbers = st.one_of(
    st.integers(),
    st.floats(allow_nan=True),
    st.sampled_from([0, -0.0, 1, 2**31, 2**32, 2**53, 2**63, 2**64, 1e308, 5e-324, 1.5, -1]),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Co"]), max_size=5),
    st.sampled_from(["", "[INST]", "</s>", "<<SYS>>", "user", "system", MODEL, "\x00", "x" * 300]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=12,
)


@fuzzed(60)
def test_any_bytes(client, path, data):
    check(client, path, data.draw(st.binary(max_size=200)))


@fuzzed(60)
def test_any_json(client, path, data):
    check(client, path, json.dumps(data.draw(values)).encode())


@fuzzed(150)
def test_valid_requests_with_faults(client, path, data):
    """One to three values of a valid request are replaced, added or removed, at any depth."""
    body = json.loads(json.dumps(data.draw(st.sampled_from(VALID[path]))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = body
        while place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if isinstance(place, dict):
                keys += NAMES
            key = data.draw(st.sampled_from(keys))
            inner = place[key] if not isinstance(place, dict) or key in place else None
            if isinstance(inner, dict | list) and data.draw(st.booleans()):
                place = inner
                continue
            if inner is not None and data.draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = data.draw(values)
            break
    check(client, path, json.dumps(body).encode())


@pytest.mark.parametrize("path", [RUN, CHAT, COMPLETIONS])
def test_every_parameter_of_every_type(client, path):
    for name in NAMES:
        for value in ("x", [None], {"a": 1}, 1.5, True, 10**30):
            check(client, path, json.dumps(VALID[path][0] | {name: value}).encode())


@fuzzed(60)
def test_valid_requests_with_corrupt_bytes(client, path, data):
    content = bytearray(json.dumps(data.draw(st.sampled_from(VALID[path]))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 4, len(content))))
        content[start:end] = data.draw(st.binary(max_size=4))
    check(client, path, bytes(content))


@pytest.mark.parametrize("path", PATHS)
def test_deep_and_huge(client, path):
    text = json.dumps("x" * 500_000).encode()
    for content in [
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b"[" * 500 + b"]" * 500,
        b'{"prompt":' + text + b"}",
        b'{"model":"' + MODEL.encode() + b'","prompt":' + text + b"}",
        b'{"model":"' + MODEL.encode() + b'","prompt":[' + b"1," * 250_000 + b"1]}",
        b'{"model":"' + MODEL.encode() + b'","prompt":[' + b'"x",' * 100_000 + b'"x"]}',
        b'{"messages":[' + b'{"role":"user","content":"x"},' * 20_000 + b"5]}",
        b"{" + b",".join(b'"%d":0' % i for i in range(50_000)) + b"}",
        b'{"prompt":"x","seed":' + b"9" * 100_000 + b"}",
        b'{"prompt":"x","temperature":' + b"1" * 300 + b"e-300}",
        b'{"prompt":"' + b"\\ud83d" * 100_000 + b'"}',
        b" " * (1 << 20) + b"1",
    ]:
        check(client, path, content)


# From the description.


@pytest.mark.clients
def test_schemathesis(tmp_path):
    """A short version of the run that CONTRIBUTING.md describes.

    It leaves out the check that every request that meets the description is accepted. The model
    card's schema accepts requests that the model cannot answer: no messages, an assistant message
    last, control tags.
    """
    with served() as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {TOKEN}", "--seed=1"]
        command += ["--phases=fuzzing", "--max-examples=5"]
        command += ["--checks=all", "--exclude-checks=positive_data_acceptance", "--no-color"]
        command += ["--request-timeout=200", "--max-response-time=200", "--continue-on-failure"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tested: 41" in done.stdout, done.stdout
