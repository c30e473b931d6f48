"""The tokenizer's routes, in vLLM's form."""

import dataclasses
import json

import pytest

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.text.chat import CHAT_TEMPLATE, encode_dialog
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers.demo import load_demo
from tests.helpers.serving import serving

NATIVE = "/client/v4/accounts/me/ai"
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Hello, 日本 😀 "},
    {"role": "user", "content": "Who are you?"},
]


@pytest.fixture(scope="module")
def llm():
    return load_demo()


@pytest.fixture(scope="module")
def client(llm):
    with serving(llm) as client:
        yield client


def tokens_of(client, **fields):
    response = client.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    return response.json()["tokens"]


def test_text_becomes_ids_and_text_again(client, llm):
    for text in ("Hello there", "", " two  spaces ", "日本 😀\n\tx", "x" * 9000):
        ids = llm.tokenizer.encode(text)
        assert tokens_of(client, prompt=text) == [1, *ids]
        assert tokens_of(client, prompt=text, add_special_tokens=False) == ids
        back = client.post(f"{NATIVE}/detokenize", json={"tokens": ids}).json()
        assert back == {"prompt": text}
    response = client.post(f"{NATIVE}/tokenize", json={"prompt": "a b", "return_token_strs": True})
    tokens = [1, *llm.tokenizer.encode("a b")]
    assert response.json() == {
        "count": len(tokens),
        "max_model_len": llm.context,
        "tokens": tokens,
        "token_strs": ["<s>", *map(llm.tokenizer.piece, tokens[1:])],
    }


def test_control_pieces_are_tokens_unless_turned_off(client, llm):
    """As for transformers' tokenizers, which lm-eval asks for the ids of `<s>` and `</s>`."""
    assert tokens_of(client, prompt="<s>", add_special_tokens=False) == [1]
    assert tokens_of(client, prompt="</s>", add_special_tokens=False) == [2]
    assert tokens_of(client, prompt="<s>a") == [1, *llm.tokenizer.encode("a")]
    letters = tokens_of(client, prompt="<s>a", parse_control=False)
    assert letters == [1, *llm.tokenizer.encode("<s>a")]
    back = client.post("/detokenize", json={"tokens": [1, 1, *llm.tokenizer.encode("a b"), 2]})
    assert back.json() == {"prompt": "<s><s>a b</s>"}


@pytest.mark.clients
@pytest.mark.parametrize("dialog", [TURNS, [SYSTEM, *TURNS], TURNS[:1], [SYSTEM, *TURNS[:1]]])
def test_a_dialog_is_encoded_and_the_template_gives_the_same_ids(client, llm, dialog):
    import jinja2  # lm-eval's, which renders the template

    expected = encode_dialog(dialog, llm.tokenizer)
    assert tokens_of(client, messages=dialog) == expected
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = client.get("/tokenizer_info").json()["chat_template"]
    text = environment.from_string(template).render(messages=dialog, add_generation_prompt=True)
    assert tokens_of(client, prompt=text, add_special_tokens=False) == expected
    assert client.post("/detokenize", json={"tokens": expected}).json() == {"prompt": text}


def test_the_tokenizers_properties(client, llm):
    for base in ("", NATIVE):
        info = client.get(f"{base}/tokenizer_info").json()
        assert info == {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "model_max_length": llm.context,
            "chat_template": CHAT_TEMPLATE,
        }


def test_other_fields_are_ignored_and_named(client):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        response = client.post(path, json={**body, "foo": 1, "bar": None}).json()
        assert response["warnings"] == ["foo is not a parameter of this route: it was ignored"]


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/tokenize", {}, "a request has either prompt or messages, expected one of them"),
        (
            "/tokenize",
            {"prompt": "a", "messages": TURNS},
            "a request has either prompt or messages",
        ),
        ("/tokenize", {"prompt": ["a"]}, "prompt is ['a'], expected a string"),
        ("/tokenize", {"prompt": "\ud800"}, "lone surrogate"),
        (
            "/tokenize",
            {"prompt": "a", "add_special_tokens": 1},
            "add_special_tokens is 1, expected",
        ),
        ("/tokenize", {"messages": []}, "messages is empty, expected at least one user message"),
        ("/tokenize", {"messages": [{"role": "x", "content": "a"}]}, "has the role 'x', expected"),
        ("/tokenize", {"messages": TURNS[:2]}, "the last message has the role assistant, expected"),
        ("/tokenize", [], "body is [], expected an object"),
        ("/detokenize", {}, "tokens is None, expected a list of token ids"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens is [1, -1], expected a list of token ids"),
        ("/detokenize", {"tokens": "a"}, "tokens is 'a', expected a list of token ids"),
        ("/detokenize", {"tokens": [1, 10**6]}, "tokens[1] is 1000000, expected a token id from 0"),
    ],
)
def test_a_wrong_request_is_a_400(client, path, body, problem):
    response = client.post(path, content=json.dumps(body))
    assert response.status_code == 400
    assert problem in response.json()["error"]["message"]


def test_another_model_is_a_404(client):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        response = client.post(path, json={**body, "model": "other"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_checkpoint_without_a_tokenizer_says_so():
    bare = Llama(dataclasses.replace(load_checkpoint(DEMO_CHECKPOINT), tokenizer=None))
    with serving(bare) as client:
        for response in (
            client.get("/tokenizer_info"),
            client.post("/tokenize", json={"prompt": "a"}),
            client.post("/detokenize", json={"tokens": [5]}),
        ):
            assert response.status_code == 400
            assert "the checkpoint has no tokenizer.model" in response.json()["error"]["message"]
