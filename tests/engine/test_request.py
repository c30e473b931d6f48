import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from llama_jax import InputError
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.parameters import SCHEMAS as PARAMETERS
from llama_jax.engine.parameters import parameter_problem
from llama_jax.engine.request import make_request
from llama_jax.text.chat import encode_dialog
from llama_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(DEMO_CHECKPOINT / "tokenizer.model")


def encoded(**request):
    """Return a request's token ids."""
    return make_request(**request).encode(TOKENIZER, TOKENIZER.vocab_size)


def test_defaults_are_explicit():
    request = make_request(prompt="Hi", seed=3)
    assert dict(request.parameters) == {
        "max_tokens": None,
        "temperature": 0.6,
        "top_p": None,
        "top_k": None,
        "min_p": 0.0,
        "seed": 3,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "allowed_tokens": None,
        "stop": (),
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": False,
    }


def test_effective_parameters_make_the_same_request():
    for parameters in (
        {"top_k": 3},
        {"stop": ("a", "b"), "logprobs": 0, "prompt_logprobs": True},
        {"min_p": 0.5, "logit_bias": {5: -100.0, 0: 1.5}, "allowed_tokens": (7, 5)},
    ):
        request = make_request(prompt="Hi", **parameters)
        effective = dict(request.parameters)
        assert effective.items() >= parameters.items()
        assert make_request(prompt="Hi", **effective) == request
        assert make_request(prompt="Hi", **json.loads(json.dumps(effective))) == request


def test_a_seed_is_drawn_anew_within_the_cards_range():
    seeds = {make_request(prompt="Hi").parameters.seed for _ in range(100)}
    assert len(seeds) == 100
    assert all(1 <= seed <= 9_999_999_999 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_any_64_bit_seed_is_a_seed(seed):
    assert make_request(prompt="Hi", seed=seed).parameters.seed == seed


@pytest.mark.parametrize("stop", ["\n", ["\n"], ("\n",)])
def test_stop_may_be_one_string_or_several(stop):
    assert make_request(prompt="Hi", stop=stop).parameters.stop == ("\n",)


@pytest.mark.parametrize("bias", [{"5": 1, "60": -2}, {5: 1, 60: -2.0}, {np.int64(5): 1, 60: -2}])
@pytest.mark.parametrize("kind", [tuple, list, np.array, lambda ids: range(ids[0], 4, -55)])
def test_token_ids_may_be_json_s_or_python_s(bias, kind):
    parameters = make_request(prompt="Hi", logit_bias=bias, allowed_tokens=kind([60, 5])).parameters
    assert parameters.logit_bias == {5: 1.0, 60: -2.0}
    assert parameters.allowed_tokens == (60, 5)
    assert {type(n) for n in (*parameters.logit_bias, *parameters.allowed_tokens)} == {int}
    assert {type(n) for n in parameters.logit_bias.values()} == {float}
    assert hash(parameters)


@pytest.mark.parametrize(
    "value", [[], [1], [1, 2], [2, 1, 2], [-1], [True], ["1"], [1.5], [None], {}, "1", 1, [[]]]
)
def test_a_list_of_token_ids_is_checked_as_its_schema_says(value):
    schema = PARAMETERS["allowed_tokens"]
    valid = Draft202012Validator(schema).is_valid(value)
    assert (parameter_problem("x", value, schema) is None) == valid


@pytest.mark.parametrize(
    "value",
    [
        *({}, {"0": 100, "999999999": -100}, {"00": 1}, {"-1": 1}, {"a": 1}, {"9" * 19: 1}),
        *({"5": 101}, {"5": None}, {"5": True}, {"5": "1"}, {str(i): 1 for i in range(1025)}),
        *([], [5], "5"),
    ],
)
def test_a_bias_is_checked_as_its_schema_says(value):
    schema = PARAMETERS["logit_bias"]
    valid = Draft202012Validator(schema).is_valid(value)
    assert (parameter_problem("x", value, schema) is None) == valid


def test_none_stands_for_the_default():
    plain = make_request(prompt="Hi", seed=1)
    assert make_request(prompt="Hi", seed=1, **dict.fromkeys(PARAMETERS.keys() - {"seed"})) == plain
    assert (plain.parameters.stop, plain.parameters.logprobs, plain.parameters.prompt_logprobs) == (
        (),
        None,
        False,
    )


def test_numbers_take_their_types():
    request = make_request(prompt="Hi", max_tokens=16.0, temperature=1, top_k=2.0)
    assert (
        request.parameters.max_tokens,
        request.parameters.temperature,
        request.parameters.top_k,
    ) == (16, 1.0, 2)
    assert [type(v) for v in (request.parameters.max_tokens, request.parameters.temperature)] == [
        int,
        float,
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", -1, "max_tokens is -1, expected an integer from 0 up"),
        ("max_tokens", 1.5, "max_tokens is 1.5, expected an integer"),
        ("max_tokens", True, "max_tokens is True, expected an integer"),
        ("temperature", -0.1, "temperature is -0.1, expected a number from 0 to 5"),
        ("temperature", 5.1, "temperature is 5.1, expected a number from 0 to 5"),
        ("temperature", "1", "temperature is '1', expected a number"),
        ("temperature", math.nan, "temperature is nan, expected a finite number"),
        ("top_p", math.inf, "top_p is inf, expected a finite number"),
        ("top_p", 2.1, "top_p is 2.1, expected a number from 0 to 2"),
        ("top_k", 0, "top_k is 0, expected an integer from 1 to 50"),
        ("top_k", 51, "top_k is 51, expected an integer from 1 to 50"),
        ("seed", -1, "seed is -1, expected an integer from 0 to 18446744073709551615"),
        ("seed", 2**64, "expected an integer from 0 to 18446744073709551615"),
        ("repetition_penalty", 2.5, "repetition_penalty is 2.5, expected a number from 0 to 2"),
        ("frequency_penalty", -1, "frequency_penalty is -1, expected a number from 0 to 2"),
        ("presence_penalty", 3, "presence_penalty is 3, expected a number from 0 to 2"),
        ("min_p", -0.1, "min_p is -0.1, expected a number from 0 to 1"),
        ("min_p", 1.5, "min_p is 1.5, expected a number from 0 to 1"),
        ("min_p", math.nan, "min_p is nan, expected a finite number"),
        ("min_p", False, "min_p is False, expected a number from 0 to 1"),
        ("logit_bias", [5], "logit_bias is [5], expected an object of token ids, each with a numb"),
        ("logit_bias", "5:1", "logit_bias is '5:1', expected an object of token ids"),
        ("logit_bias", {"Paris": 1}, "logit_bias has the key 'Paris', expected a token id"),
        ("logit_bias", {-1: 1}, "logit_bias has the key -1, expected a token id"),
        ("logit_bias", {"05": 1}, "logit_bias has the key '05', expected a token id"),
        ("logit_bias", {"5\n": 1}, "logit_bias has the key '5\\n', expected a token id"),
        ("logit_bias", {1e9: 1}, "logit_bias has the key 1000000000.0, expected a token id"),
        ("logit_bias", {"9" * 5000: 1}, "logit_bias has the key '999"),
        ("logit_bias", {True: 1}, "logit_bias has the key True, expected a token id"),
        ("logit_bias", {5: 101}, "logit_bias[5] is 101, expected a number from -100 to 100"),
        ("logit_bias", {5: -100.5}, "logit_bias[5] is -100.5, expected a number from -100 to 100"),
        ("logit_bias", {5: math.nan}, "logit_bias[5] is nan, expected a finite number"),
        ("logit_bias", {5: True}, "logit_bias[5] is True, expected a number from -100 to 100"),
        ("logit_bias", {5: None}, "logit_bias[5] is None, expected a number from -100 to 100"),
        (
            "logit_bias",
            dict.fromkeys(range(1025), 1),
            "has 1,025 token ids, expected at most 1,024",
        ),
        ("allowed_tokens", [], "allowed_tokens is [], expected a list of at least 1 token id"),
        ("allowed_tokens", 5, "allowed_tokens is 5, expected a list of at least 1 token id"),
        ("allowed_tokens", "5", "allowed_tokens is '5', expected a list of at least 1 token id"),
        ("allowed_tokens", [5, -1], "allowed_tokens[1] is -1, expected a token id"),
        ("allowed_tokens", ["5"], "allowed_tokens[0] is '5', expected a token id"),
        ("allowed_tokens", [True], "allowed_tokens[0] is True, expected a token id"),
        ("allowed_tokens", [5.5], "allowed_tokens[0] is 5.5, expected a token id"),
        ("allowed_tokens", [5, 6, 5], "allowed_tokens has 5 more than once, expected each token"),
        ("ignore_eos", 1, "ignore_eos is 1, expected true or false"),
        ("stop", "", "stop is [''], expected a string, or a list of up to 16 that are not empty"),
        ("stop", ["a", ""], "stop is ['a', ''], expected a string, or a list of up to 16 that are"),
        ("stop", ["a"] * 17, "expected a string, or a list of up to 16 that are not empty"),
        ("stop", [5], "stop is [5], expected a string, or a list"),
        ("stop", 5, "stop is 5, expected a string, or a list"),
        ("stop", {"a": 1}, "stop is {'a': 1}, expected a string, or a list"),
        ("logprobs", -1, "logprobs is -1, expected an integer from 0 to 20"),
        ("logprobs", 21, "logprobs is 21, expected an integer from 0 to 20"),
        ("logprobs", True, "logprobs is True, expected an integer from 0 to 20"),
        ("prompt_logprobs", 1, "prompt_logprobs is 1, expected true or false"),
        ("prompt_logprob", True, "'prompt_logprob', did you mean prompt_logprobs?"),
        ("topk", 3, "unknown parameter 'topk', did you mean top_k?"),
    ],
)
def test_out_of_range(name, value, expected):
    with pytest.raises(InputError) as error:
        make_request(prompt="Hi", **{name: value})
    assert expected in str(error.value)


@pytest.mark.parametrize(("name", "schema"), PARAMETERS.items())
def test_the_ends_of_every_range_are_in_it(name, schema):
    for end in ("minimum", "maximum"):
        if end in schema:
            assert make_request(prompt="Hi", **{name: schema[end]}).parameters[name] == schema[end]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, "no prompt given, expected one of prompt, messages and prompt_tokens"),
        (
            {"prompt": "a", "messages": []},
            "prompt, messages are given together, expected one of them",
        ),
        ({"prompt": "a", "prompt_tokens": [1]}, "prompt, prompt_tokens are given together"),
        ({"prompt": ""}, "prompt is empty, expected at least 1 character"),
        ({"prompt": 5}, "prompt is 5, expected a string"),
        ({"messages": "hi"}, "messages is 'hi', expected a list"),
        ({"messages": {"role": "user"}}, "expected a list"),
        ({"system": "s", "messages": [{}]}, "system is given with messages"),
        ({"system": "s", "prompt": "a", "raw": True}, "system is given with raw"),
        ({"raw": True, "prompt_tokens": [1]}, "raw is given with prompt_tokens"),
        ({"raw": "no", "prompt": "a"}, "raw is 'no', expected true or false"),
        ({"system": 5, "prompt": "a"}, "system is 5, expected a string"),
        ({"prompt_tokens": []}, "prompt_tokens is empty, expected at least 1 token id"),
        ({"prompt": "[INST] a"}, "contains the control tag [INST]"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0] has the role 'tool'"),
        ({"prompt": "a", "parse_control": True}, "parse_control is given without raw"),
        ({"prompt": "a", "parse_control": 1}, "parse_control is 1, expected true or false"),
        ({"prompt": "a", "allow_control_tags": "x"}, "allow_control_tags is 'x', expected true"),
        ({"prompt": "a", "allow_control_tag": True}, "did you mean allow_control_tags?"),
        ({"promt": "a"}, "unknown parameter 'promt', did you mean prompt?"),
    ],
)
def test_prompt_forms(request_, expected):
    with pytest.raises(InputError) as error:
        make_request(**request_)
    assert expected in str(error.value)


def test_one_error_names_every_problem():
    with pytest.raises(InputError) as error:
        make_request(prompt="", temperature=9, top_k=0)
    for part in ("prompt is empty", "temperature is 9", "top_k is 0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 97], "prompt_tokens[1] is 97, expected a token id from 0 to 96"),
        ([-1], "prompt_tokens[0] is -1"),
        ([True], "prompt_tokens[0] is True"),
        (["1"], "prompt_tokens[0] is '1'"),
    ],
)
def test_token_ids(tokens, expected):
    with pytest.raises(InputError) as error:
        make_request(prompt_tokens=tokens).encode(None, 97)
    assert expected in str(error.value)


@pytest.mark.parametrize("array", [np.array([1, 5], np.int64), jnp.array([1, 5])])
def test_arrays_and_their_scalars_are_taken(array):
    for tokens in (array, list(array), tuple(array)):
        request = make_request(prompt_tokens=tokens, seed=array[1], temperature=np.float32(0.5))
        assert request.encode(None, 97) == [1, 5]
        assert (request.parameters.seed, request.parameters.temperature) == (5, 0.5)
        assert type(request.parameters.seed) is int


def test_text_needs_a_tokenizer():
    with pytest.raises(InputError, match=r"no tokenizer\.model.*give prompt_tokens"):
        make_request(prompt="Hi").encode(None, 97)


RAW_DIALOG = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]"


def test_parsed_control_pieces_make_a_raw_dialog_metas_ids():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    ids = encoded(prompt=RAW_DIALOG, raw=True, parse_control=True)
    assert ids == encode_dialog(messages, TOKENIZER)
    without_first = RAW_DIALOG.removeprefix("<s>")
    assert encoded(prompt=without_first, raw=True, parse_control=True) == ids


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<s>", [1]), ("</s>", [1, 2]), ("<s><s>", [1, 1]), ("<s></s>", [1, 2])],
)
def test_control_pieces_alone(prompt, expected):
    assert encoded(prompt=prompt, raw=True, parse_control=True) == expected


@pytest.mark.parametrize("text", ["x", " x", "<S> < s> <s", "</ s>", "<unk>"])
def test_text_without_control_pieces_is_encoded_as_ever(text):
    plain = make_request(prompt=text, raw=True)
    assert plain.warnings(TOKENIZER) == []
    assert encoded(prompt=text, raw=True, parse_control=True) == encoded(prompt=text, raw=True)


def test_control_pieces_that_are_plain_text_are_named():
    request = make_request(prompt="a</s><s>b<s>", raw=True)
    assert [warning.split(", ")[0] for warning in request.warnings(TOKENIZER)] == [
        "the prompt contains <s>",
        "the prompt contains </s>",
    ]
    ids = request.encode(TOKENIZER, TOKENIZER.vocab_size)
    assert (ids.count(1), ids.count(2)) == (1, 0)
    assert make_request(prompt="<s>", raw=True, parse_control=True).warnings(TOKENIZER) == []
    # In the chat format they are plain text, as in Meta's: users write the words, not the tokens.
    assert make_request(prompt="<s>").warnings(TOKENIZER) == []
