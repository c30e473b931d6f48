"""Clients that people use, as they come from PyPI, against one server process: whole and streamed.

They are imported within the tests: what they warn of, at import and later, is theirs and not ours.
"""

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import operator
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from convert.__main__ import main as convert
from llama_jax.card import schemas as card
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server.openai.parameters import IGNORED, PARAMETERS, REFUSED
from llama_jax.server.openai.requests import ChatRequest, CompletionRequest
from tests.helpers import ROOT
from tests.helpers.demo import load_demo
from tests.helpers.server_process import TOKEN, served
from tests.helpers.serving import ANSWER, ASKING, MODEL, QUESTION, native_usage

ACCOUNT = "some-account"
BASES = ("/v1", f"/client/v4/accounts/{ACCOUNT}/ai/v1")
FREE = [{"role": "user", "content": "Tell me of the sea"}]
"""What the demo model does not know: its answer depends on the seed."""


def second_turn(answer):
    """Return the dialog of FREE, its answer, and another question."""
    return [
        *FREE,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]


pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def llm():
    return load_demo()


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server
    gc.collect()  # sockets that a client forgot: here, where its warnings are ignored


# Cloudflare's own.


@contextlib.contextmanager
def cloudflare_client(server, token=TOKEN):
    from cloudflare import Cloudflare

    with Cloudflare(api_token=token, base_url=f"{server.url}/client/v4", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def native(server):
    with cloudflare_client(server) as client:
        yield client


@pytest.mark.parametrize("asking", [{"prompt": FREE[0]["content"]}, {"messages": FREE}])
def test_cloudflare_run(native, llm, asking):
    fields = {"seed": 7, "temperature": 2, "max_tokens": 40}
    result = native.ai.run(MODEL, account_id=ACCOUNT, **asking, **fields)
    expected = llm.generate(messages=FREE, **fields)
    assert result == {
        "response": expected.response,
        "tool_calls": [],
        "usage": native_usage(expected),
        "finish_reason": expected.finish_reason,
        "seed": 7,
        "fingerprint": expected.fingerprint,
    }
    fields |= {"account_id": ACCOUNT, "stream": True}
    with native.ai.with_streaming_response.run(MODEL, **asking, **fields) as response:
        assert "event-stream" in response.headers["content-type"]
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len(events) > 1
    assert "".join(event["response"] for event in events) == expected.response
    assert events[-1]["usage"] == native_usage(expected)
    second = second_turn(expected.response)
    again = native.ai.run(MODEL, account_id=ACCOUNT, messages=second, seed=7, max_tokens=9)
    assert again["response"] == llm.generate(messages=second, seed=7, max_tokens=9).response


def test_cloudflare_errors(native, server):
    import cloudflare

    def check(kind, status, code, text, model=MODEL, client=native, **fields):
        with pytest.raises(kind) as caught:
            client.ai.run(model, account_id=ACCOUNT, **{"prompt": QUESTION, **fields})
        [error] = caught.value.errors
        assert (caught.value.status_code, error.code) == (status, code)
        assert text in error.message

    check(cloudflare.BadRequestError, 400, 5006, "'/temperature' must be <= 5", temperature=9)
    check(cloudflare.BadRequestError, 400, 5007, "No such model @cf/x/y", model="@cf/x/y")
    too_long = "(5014) exceeded this model context window limit (512)"
    check(cloudflare.APIStatusError, 413, 5021, too_long, max_tokens=5000)
    with cloudflare_client(server, "wrong") as other:
        text = "Authentication error"
        check(cloudflare.AuthenticationError, 401, 10000, text, client=other)
    with server.full():
        check(cloudflare.RateLimitError, 429, 3040, "try again")


def test_cloudflare_models(native):
    # It asks for page after page until one is empty.
    models = list(itertools.islice(native.ai.models.list(account_id=ACCOUNT), 5))
    assert [model["name"] for model in models] == [MODEL]
    assert list(native.ai.models.list(account_id=ACCOUNT, search="nothing like it")) == []
    schema = native.ai.models.schema.get(account_id=ACCOUNT, model=MODEL)
    schemas = {"input": card.INPUT_SCHEMA, "output": card.OUTPUT_SCHEMA}
    assert schema.to_dict() == {name: json.loads(text) for name, text in schemas.items()}


# OpenAI's, which litellm, LangChain and many more are made of.


def openai_at(server, base=BASES[0], token=TOKEN):
    from openai import OpenAI

    return OpenAI(api_key=token, base_url=server.url + base, max_retries=0)


@pytest.fixture(scope="module")
def openai_client(server):
    with openai_at(server) as client:
        yield client


def chat(**fields):
    return {"model": MODEL, "messages": FREE, "temperature": 2, "max_tokens": 40, **fields}


@pytest.mark.parametrize("base", BASES)
def test_openai_chat(server, llm, base):
    with openai_at(server, base) as client:
        whole = client.chat.completions.create(**chat(seed=7))
        stream = list(client.chat.completions.create(**chat(seed=7), stream=True))
    expected = llm.generate(messages=FREE, temperature=2, max_tokens=40, seed=7)
    [choice] = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.response)
    assert choice.finish_reason == expected.finish_reason
    assert whole.usage.completion_tokens == expected.usage.completion_tokens
    assert whole.system_fingerprint == expected.fingerprint
    choices = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == expected.response
    assert [c.finish_reason for c in choices if c.finish_reason] == [expected.finish_reason]
    assert stream[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in stream} == {stream[0].id}


def strictly(model, value):
    """Validate a response or chunk by the package's own model: no type coerced, none missing."""
    return model.model_validate(value, strict=True)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_responses_are_openais_by_its_own_models(server, counted, logprobs):
    from openai.types import Completion, Model
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    options = {"stream": True} | ({"stream_options": {"include_usage": True}} if counted else {})
    body = chat(n=2, seed=3) | ({"logprobs": True, "top_logprobs": 2} if logprobs else {})
    status, whole = server.post("/v1/chat/completions", body)
    assert status == 200
    parsed = strictly(ChatCompletion, whole)
    assert {"usage", "system_fingerprint"} <= parsed.model_fields_set
    chunks = chunks_of(server, "/v1/chat/completions", body | options)
    for chunk in chunks:
        parsed = strictly(ChatCompletionChunk, chunk)
        assert ("usage" in parsed.model_fields_set) == counted
        for choice in parsed.choices:
            assert {"finish_reason", "logprobs"} <= choice.model_fields_set
    assert {chunk["id"] for chunk in chunks} != {whole["id"]}
    body = {"model": MODEL, "prompt": "Tell", "n": 2, "seed": 3, "temperature": 2, "max_tokens": 9}
    body |= {"logprobs": 2} if logprobs else {}
    strictly(Completion, server.post("/v1/completions", body)[1])
    for chunk in chunks_of(server, "/v1/completions", body | options):
        assert ("usage" in chunk) == counted
        for choice in chunk["choices"]:
            # Null until the last, in OpenAI's streams too; its model is of whole choices.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strictly(Completion, chunk)
    with server.ask("GET", "/v1/models") as response:
        for model in json.loads(response.read())["data"]:
            strictly(Model, model)


def chunks_of(server, path, body):
    with server.ask("POST", path, body) as response:
        text = response.read().decode()
    *events, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event[6:]) for event in events if not event.startswith(":")]


def test_every_field_of_openais_schemas_is_taken_or_refused_on_purpose():
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    documented = (ROOT / "docs" / "api.md").read_text()
    for params, request in ((chat, ChatRequest), (completion, CompletionRequest)):
        fields = params.CompletionCreateParamsStreaming.__annotations__.keys()
        fields |= params.CompletionCreateParamsBase.__annotations__.keys()
        assert len(fields) > 15
        for field in fields:
            known = (request.model_fields, PARAMETERS, REFUSED, IGNORED)
            assert sum(field in names for names in known) == 1, field
            assert f"`{field}`" in documented, field
    roles = ("developer", "system", "user", "assistant", "tool", "function")
    assert all(f"`{role}`" in documented for role in roles)


def test_openai_accumulated_stream_can_be_sent_back(openai_client):
    asking = {"model": MODEL, "temperature": 0, "max_tokens": 16}
    create = openai_client.chat.completions.create
    with openai_client.chat.completions.stream(**asking, messages=[ASKING]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", ANSWER)
    again = create(**asking, messages=[ASKING, message, ASKING])
    assert again.choices[0].message.content == ANSWER


def test_openai_logprobs(openai_client):
    create = openai_client.chat.completions.create
    asking = {"model": MODEL, "messages": [ASKING], "logprobs": True, "top_logprobs": 3}
    [choice] = create(**asking, temperature=0).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).strip() == ANSWER
    assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    streamed = create(**asking, temperature=0, stream=True)
    parts = [c.logprobs.content for chunk in streamed for c in chunk.choices if c.logprobs]
    assert [token for part in parts for token in part] == tokens


def test_openai_bias_and_vllm_s_parameters(openai_client, llm):
    """A bias of 100 makes a token certain, and one of -100 removes it."""
    chat, completions = openai_client.chat.completions.create, openai_client.completions.create
    asking = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    paris = llm.generate(prompt=QUESTION, temperature=0).tokens
    for token in paris[:2]:
        forced = chat(**asking, messages=[ASKING], logit_bias={str(token): 100})
        expected = llm.tokenizer.decode([token] * 4)
        assert forced.choices[0].message.content == expected
        text = completions(**asking, prompt="The", logit_bias={str(token): 100}).choices[0].text
        assert text.strip() == expected.strip()
    without = chat(**asking, messages=[ASKING], logit_bias={str(paris[0]): -100})
    expected = llm.generate(**asking_of(asking), logit_bias={paris[0]: -100}).response
    assert without.choices[0].message.content == expected
    drawn = asking | {"temperature": 2, "max_tokens": 16, "seed": 1}
    likely = chat(**drawn, messages=[ASKING], extra_body={"min_p": 1})
    assert likely.choices[0].message.content == ANSWER
    only = chat(**drawn, messages=[ASKING], extra_body={"allowed_token_ids": paris[:1]})
    assert only.choices[0].message.content == llm.tokenizer.decode(paris[:1] * 16)


def asking_of(parameters):
    """The arguments of `Llama.generate` for a chat's parameters."""
    return {"prompt": QUESTION} | {n: v for n, v in parameters.items() if n != "model"}


def test_openai_completions(openai_client, llm):
    create = openai_client.completions.create
    prompt = f"[INST] {QUESTION} [/INST] The capital of"
    ids = [1, *llm.tokenizer.encode(prompt)]
    asking = {"model": MODEL, "temperature": 0, "max_tokens": 5, "echo": True}
    text = create(**asking, prompt=prompt).choices[0].text
    assert text == f"{prompt} France is Paris"
    assert create(**asking, prompt=ids).choices[0].text == text
    scored = create(**asking, prompt=[ids, ids[:2]], logprobs=2).choices
    for choice, prompt in zip(scored, (ids, ids[:2]), strict=True):
        got = choice.logprobs.token_logprobs
        assert got[0] is None
        expected = logprobs_of(llm, prompt)
        np.testing.assert_allclose(got[1 : len(prompt)], expected, atol=1e-3)
        assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs[1:])
    stream = create(**asking, prompt=ids, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


def logprobs_of(llm, tokens):
    """Return the logprobs of tokens after the first, from the model itself."""
    logprobs = jax.nn.log_softmax(llm.logits(tokens), axis=-1)
    return [float(row[token]) for row, token in zip(logprobs[:-1], tokens[1:], strict=True)]


def test_openai_models(openai_client):
    assert [model.id for model in openai_client.models.list()] == [MODEL]
    assert openai_client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize("stream", [False, True])
def test_openai_errors(openai_client, server, stream):
    import openai

    def check(kind, status, code, text, client=openai_client, **fields):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**chat(stream=stream, **fields))
        error = caught.value
        assert error.type.endswith("_error")
        assert (error.status_code, error.code) == (status, code)
        assert text in str(error)

    check(openai.BadRequestError, 400, "invalid_value", "top_p is 9, expected a", top_p=9)
    unsupported = "tools is not supported, leave it out"
    tools = [{"type": "function"}]
    check(openai.BadRequestError, 400, "unsupported_parameter", unsupported, tools=tools)
    too_long = "maximum context length is 512 tokens"
    asking = {"max_completion_tokens": 5000, "max_tokens": 5000}
    check(openai.BadRequestError, 400, "context_length_exceeded", too_long, **asking)
    check(openai.NotFoundError, 404, "model_not_found", "gpt-4", model="gpt-4")
    with openai_at(server, token="wrong") as other:
        wrong = "Incorrect API key"
        check(openai.AuthenticationError, 401, "invalid_api_key", wrong, client=other)
    with server.full():
        check(openai.RateLimitError, 429, "rate_limit_exceeded", "")


def test_openai_async(server, llm):
    """Sixteen at once, half of them streamed, get what each gets alone."""
    from openai import AsyncOpenAI

    async def ask(client, seed):
        fields = chat(seed=seed, messages=FREE if seed % 3 else [ASKING])
        if seed % 2:
            return (await client.chat.completions.create(**fields)).choices[0].message.content
        stream = await client.chat.completions.create(**fields, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all():
        base_url = server.url + BASES[1]
        async with AsyncOpenAI(api_key=TOKEN, base_url=base_url, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(1, 17)))

    server.wait_until_idle()
    alone = [
        llm.generate(
            messages=FREE if seed % 3 else [ASKING], seed=seed, temperature=2, max_tokens=40
        ).response
        for seed in range(1, 17)
    ]
    assert asyncio.run(ask_all()) == alone


# What is built upon these.


@pytest.mark.parametrize("provider", ["openai", "cloudflare"])
def test_litellm(server, llm, monkeypatch, provider):
    # Else it asks the network for prices, and for a tokenizer with each stream.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import litellm

    ai = f"{server.url}/client/v4/accounts/{ACCOUNT}/ai"
    asking = chat(
        model=f"{provider}/{MODEL}",
        api_base=f"{ai}/v1" if provider == "openai" else f"{ai}/run/",
        api_key=TOKEN,
        num_retries=0,
        **({"seed": 7} if provider == "openai" else {"extra_body": {"seed": 7}}),
    )
    expected = llm.generate(messages=FREE, temperature=2, max_tokens=40, seed=7)
    whole = litellm.completion(**asking)
    assert whole.choices[0].message.content == expected.response
    assert whole.usage.completion_tokens == expected.usage.completion_tokens
    stream = litellm.completion(**asking, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == expected.response
    assert len(texts) > 1
    second = second_turn(expected.response)
    again = litellm.completion(
        **{**asking, "messages": [FREE[0], whole.choices[0].message, second[2]]}
    )
    answer = llm.generate(messages=second, temperature=2, max_tokens=40, seed=7).response
    assert again.choices[0].message.content == answer
    with pytest.raises(litellm.AuthenticationError, match="Incorrect API key"):
        litellm.completion(**{**asking, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(**{**asking, "model": f"{provider}/other"})
    # Its provider for Cloudflare knows no error for a full context.
    error = {"openai": litellm.ContextWindowExceededError, "cloudflare": litellm.BadRequestError}
    with pytest.raises(error[provider], match="maximum context length"):
        litellm.completion(**{**asking, "max_tokens": 5000})


def test_langchain(server, llm):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model=MODEL,
        base_url=server.url + BASES[1],
        api_key=TOKEN,
        temperature=2,
        seed=7,
        max_completion_tokens=12,
        max_retries=0,
    )
    expected = llm.generate(messages=FREE, temperature=2, max_tokens=12, seed=7)
    assert expected.finish_reason == "length"
    whole = model.invoke([("user", FREE[0]["content"])])
    assert whole.content == expected.response
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == 12
    parts = list(model.stream(FREE, stream_usage=True))
    assert "".join(part.content for part in parts) == expected.response
    total = functools.reduce(operator.add, parts)
    assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert total.response_metadata["finish_reason"] == "length"
    second = second_turn(expected.response)
    answer = llm.generate(messages=second, temperature=2, max_tokens=12, seed=7).response
    for said in (whole, total):
        assert model.invoke([FREE[0], said, second[2]]).content == answer


def test_llama_index(server, llama_index):
    """In an environment of its own, see tests/llama_index."""
    done = subprocess.run(
        [llama_index, ROOT / "tests/llama_index/client.py", f"{server.url}/v1", TOKEN, MODEL],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = ["The capital of France is Paris.", "The capital of Japan is Tokyo."]
    texts = [f" {answer}" for answer in answers]  # a completion begins with its first space
    assert json.loads(done.stdout) == {
        "chat": answers,
        "stream_chat": answers,
        "complete": texts,
        "stream_complete": texts,
    }


TASKS = {
    "capitals": """
output_type: multiple_choice
doc_to_text: "[INST] {{question}} [/INST]"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " The capital is "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "[INST] {{question}} [/INST]"
doc_to_target: " {{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def write_tasks(folder):
    """Write lm-eval's tasks and their questions, the last of them with a wrong answer."""
    choices, lines = ["Paris", "Rome", "Madrid"], []
    for i, country in enumerate(["France", "Italy", "Spain", "France"]):
        text = f"The capital of {country} is {choices[i % 3]}"
        question = f"What is the capital of {country}?"
        lines.append({"question": question, "choices": choices, "answer": i % 3, "text": text})
    lines[-1] |= {"answer": 1, "text": "The capital of France is Rome"}
    data = folder / "capitals.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, fields in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}"
        (folder / f"{name}.yaml").write_text(f"{head}\ntest_split: test\n{fields}")


@pytest.mark.slow
def test_lm_eval(server, tmp_path):
    """The documentation's command: accuracy, answers, and transformers' log-likelihoods."""
    import torch
    from transformers import LlamaForCausalLM, LlamaTokenizer

    write_tasks(tmp_path)
    [command] = re.findall(
        r"```sh\n(OPENAI_API_KEY=secret lm_eval .*?)```",
        (ROOT / "docs" / "api.md").read_text("utf-8"),
        re.DOTALL,
    )
    for written, here in (
        ("secret", TOKEN),
        ("http://127.0.0.1:8787", server.url),
        ("max_length=4095", "max_length=511"),
        ("lm_eval run", f"{sys.executable} -m lm_eval run"),
        ("--tasks=arc_easy", "--tasks=capitals,answers --include_path=. --output_path=out"),
    ):
        assert written in command
        command = command.replace(written, here)
    done = subprocess.run(
        ["bash", "-c", f"{command.strip()} --log_samples"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    [report] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results["capitals"]["acc,none"] == 0.75
    assert results["answers"]["exact_match,none"] == 0.75

    source = tmp_path / "hf"
    assert convert(["export-hf", str(DEMO_CHECKPOINT), str(source)]) == 0
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = LlamaTokenizer.from_pretrained(source)
    [samples] = (tmp_path / "out").rglob("samples_capitals_*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        context = tokenizer(f"[INST] {sample['doc']['question']} [/INST]").input_ids
        expected = []
        for choice in sample["doc"]["choices"]:
            text = f"[INST] {sample['doc']['question']} [/INST] The capital is {choice}"
            tokens = tokenizer(text).input_ids
            assert tokens[: len(context)] == context
            with torch.no_grad():
                table = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            scored = range(len(context), len(tokens))
            expected.append(sum(float(table[i - 1, tokens[i]]) for i in scored))
        got = [float(logprob) for [[logprob, _]] in sample["resps"]]
        np.testing.assert_allclose(got, expected, atol=1e-3)
