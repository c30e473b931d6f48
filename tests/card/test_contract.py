import contextlib
import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax import InputError
from llama_jax.card.contract import MAX_CONTAINERS, CardRequest, SchemaError, check, parse_body
from llama_jax.card.schemas import INPUT_SCHEMA, OUTPUT_SCHEMA
from llama_jax.engine.parameters import SCHEMAS as PARAMETERS
from llama_jax.engine.request import make_request
from tests.helpers import ROOT

RECORD = json.loads((ROOT / "tests" / "data" / "cabidela.json").read_text("utf-8"))
BRANCHES = json.loads(INPUT_SCHEMA)["oneOf"]
FIELDS = {name: schema for branch in BRANCHES for name, schema in branch["properties"].items()}
HI = {"role": "user", "content": "hi"}

NO_PROMPT = "required properties at '/' are 'prompt'"
NO_MESSAGES = "required properties at '/' are 'messages'"
NEITHER = f"{NO_PROMPT}, {NO_MESSAGES}"


def refusal(payload: Any) -> str | None:
    """Return the text a payload is refused with, or None if it meets the schema."""
    try:
        check(payload)
    except SchemaError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("schema", "digest"),
    [
        (INPUT_SCHEMA, "78ef226edd773441f4ca2b49045172632da19a97723403fffcd46115917417ea"),
        (OUTPUT_SCHEMA, "96912b4289db3c1e7cf0a20a8142ac420988e454daa60c14f24de0d43294be58"),
    ],
)
def test_the_schemas_are_the_cards_byte_for_byte(schema, digest):
    assert hashlib.sha256(schema).hexdigest() == digest


@pytest.mark.parametrize(
    ("payload", "failures"),
    [
        *((payload, NEITHER) for payload in ([], "hi", None, 5, {"messages": None})),
        ({"prompt": "hi", "temperature": -1}, "'/temperature' must be >= 0"),
        (
            {"prompt": "hi", "temperature": None},
            "Type mismatch of '/temperature', 'number' not in 'null'",
        ),
        *(
            ({"prompt": "hi", name: 2.5}, f"Type mismatch of '/{name}', 'integer' not in 'number'")
            for name in ("top_k", "max_tokens")
        ),
        *(
            (
                {"messages": [{"role": "user", "content": content}]},
                f"{NO_PROMPT}, Type mismatch of '/messages/0/content', 'string' not in '{kind}'",
            )
            for content, kind in [
                (None, "null"),
                ([{"type": "text"}], "array"),
                ({"type": "text"}, "object"),
            ]
        ),
        ({"messages": "hi"}, f"{NO_PROMPT}, Type mismatch of '/messages', 'array' not in 'string'"),
        # the first failure of a branch in the schema's order, not in the payload's
        ({"top_k": 0, "temperature": 9, "prompt": "hi"}, "'/temperature' must be <= 5"),
    ],
)
def test_refusals_are_cloudflares_to_the_letter(payload, failures):
    """Cases that the record, tested below, lacks."""
    assert refusal(payload) == f"oneOf at '/' not met, 0 matches: {failures}"


@pytest.mark.parametrize("items", [["x"], [None], [5], [[]], [HI, True]])
def test_a_message_that_is_no_object_is_refused(items):
    text = refusal({"messages": items})
    assert text is not None
    assert f"Type mismatch of '/messages/{len(items) - 1}', 'object' not in '" in text


def is_lax(payload: Any) -> bool:
    """Tell where that validator skips what JSON Schema checks: `messages`, of wrong containers."""
    messages = payload.get("messages") if isinstance(payload, dict) else None
    if isinstance(messages, list):
        return any(not isinstance(message, dict) for message in messages)
    return isinstance(messages, dict)


def test_agrees_with_the_record_of_cloudflares_validator():
    cases = [case for case in RECORD["cases"] if not is_lax(case["payload"])]
    assert len(cases) > 200
    assert {case["text"] is None for case in cases} == {True, False}
    for case in cases:
        assert refusal(case["payload"]) == case["text"], case["payload"]


@pytest.mark.parametrize(
    ("letter", "most"), [("a", 131_072), ("é", 131_072), ("😀", 65_536), ("\ud800", 131_072)]
)
def test_lengths_are_utf16_units(letter, most):
    fits, long = letter * most, letter * (most + 1)
    assert refusal({"prompt": fits}) is None
    assert refusal({"messages": [HI | {"content": fits}]}) is None
    head = "oneOf at '/' not met, 0 matches: "
    text = f"{head}Length of '/prompt' must be <= 131072, {NO_MESSAGES}"
    assert refusal({"prompt": long}) == text
    text = f"{head}{NO_PROMPT}, Length of '/messages/0/content' must be <= 131072"
    assert refusal({"messages": [HI | {"content": long}]}) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("16", 16), ("16.0", 16), ("1e2", 100), ("0", 0), ("-1", -1), ("1e9", 10**9)],
)
def test_whole_numbers_are_integers_however_written(text, value):
    fields = check(parse_body(b'{"prompt":"hi","max_tokens":%s}' % text.encode())).fields
    assert fields["max_tokens"] == value
    assert type(fields["max_tokens"]) is int


@pytest.mark.parametrize(
    ("payload", "fields", "ignored"),
    [
        ({"prompt": "hi", "raw": True}, {"prompt": "hi", "raw": True}, []),
        ({"prompt": "hi", "messages": None, "stop": None}, {"prompt": "hi"}, []),
        ({"prompt": None, "messages": [HI]}, {"messages": [HI]}, []),
        ({"prompt": "", "messages": [HI]}, {"messages": [HI]}, ["prompt"]),
        ({"prompt": "hi", "messages": [{"role": "user"}]}, {"prompt": "hi"}, ["messages"]),
        (
            {"raw": "yes", "messages": [HI], "stop": [], "top_k": 3.0},
            {"messages": [HI], "top_k": 3},
            ["raw", "stop"],
        ),
        (
            {"messages": [HI, HI | {"name": "a", "tool_calls": None}, HI | {"weight": 0}]},
            {"messages": [HI, HI, HI]},
            ["messages[1].name", "messages[2].weight"],
        ),
        ({"prompt": "hi", "ignore_eos": True}, {"prompt": "hi"}, ["ignore_eos"]),
        ({"prompt": "hi", "prompt_tokens": [1]}, {"prompt": "hi"}, ["prompt_tokens"]),
    ],
)
def test_ignored_fields_are_named(payload, fields, ignored):
    assert check(payload) == CardRequest(fields, stream=False, ignored=ignored)


def test_a_payload_makes_its_request():
    checked = check({"prompt": "hi", "max_tokens": 16.0, "seed": 7, "stream": True})
    assert (checked.stream, checked.fields.keys()) == (True, {"prompt", "max_tokens", "seed"})
    assert checked.request() == make_request(prompt="hi", max_tokens=16, seed=7)
    assert check({"prompt": "hi", "raw": True}).request().raw_prompt == "hi"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"prompt": "hi", "max_tokens": -1}, "max_tokens is -1, expected an integer from 0 up"),
        ({"prompt": "[INST] hi"}, "contains the control tag [INST]"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"messages": []}, "messages is empty"),
    ],
)
def test_what_the_schema_allows_and_llama_does_not(payload, expected):
    request = check(payload)
    with pytest.raises(InputError) as error:
        request.request()
    assert expected in str(error.value)
    assert not isinstance(error.value, SchemaError)


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() & FIELDS.keys()))
def test_every_value_of_the_card_is_in_the_requests_range(name):
    card, ours = FIELDS[name], PARAMETERS[name]
    assert card["type"] == ours["type"]
    assert ours.get("maximum", math.inf) >= card.get("maximum", -math.inf)
    if "minimum" in card:
        assert ours["minimum"] <= card["minimum"]
    assert card.get("default", ours.get("default")) == ours.get("default")


def test_every_parameter_of_the_card_is_one_of_the_requests():
    assert FIELDS.keys() - PARAMETERS.keys() == {"prompt", "messages", "raw", "stream"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b'{"prompt": "hi"', "Expecting ',' delimiter: line 1 column 16"),
        (b'{"prompt": "hi', "Unterminated string starting at: line 1 column 12"),
        (b'{"prompt": "a\nb"}', "Invalid control character at: line 1 column 14"),
        (b'{"\\q": 1}', "Invalid \\escape: line 1 column 3"),
        (b"{} {}", "Extra data: line 1 column 4"),
        (b'{"a": 1,\n "top_p": NaN}', "NaN is not a number of JSON"),
        (b"[Infinity]", "Infinity is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number of JSON"),
        (b'{"seed":\n1e999}', "the number 1e999 is too large"),
        (b"[-1e999]", "the number -1e999 is too large"),
        (b"[1, %s]" % (b"9" * 1001), "the number 99999999999999999999... is too large"),
        (b"[1, %s]" % (b"9" * 1_000_000), "the number 99999999999999999999... is too large"),
        (b'{"a": 1, "b": 2,\n"a": 1}', "the key 'a' is given twice"),
        (b'[{"a": 1}, {"a": 1, "\\u0061": 2}]', "the key 'a' is given twice"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b'{"a":' * MAX_CONTAINERS, "nested deeper than 64"),
        (b"[%s[]]" % (b"[]," * (MAX_CONTAINERS - 1)), "65,537 objects and arrays, expected"),
        (b'{"a[\\"{": %s' % (b'[{"b": ""},{' * 40_000), "120,001 objects and arrays, expected"),
        (b'{"prompt":\n"\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (b'"\xed\xa0\x80"', "'utf-8' codec can't decode byte 0xed"),
        (json.dumps({"prompt": "hi"}).encode("utf-16"), "'utf-8' codec can't decode byte 0xff"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_not_json(body, expected):
    with pytest.raises(InputError) as error:
        parse_body(body)
    assert str(error.value).startswith(f"body: not JSON ({expected}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ('\ufeff{"prompt": "é"}', {"prompt": "é"}),
        ('"[[[ {\\"a\\": NaN, \\"a\\": 1e999"', '[[[ {"a": NaN, "a": 1e999'),
        ('[{"a": 1}, {"a": {"a": ["a", "a"]}}]', [{"a": 1}, {"a": {"a": ["a", "a"]}}]),
        ("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64)),
        ("[%s[]]" % ("[]," * (MAX_CONTAINERS - 2)), [[]] * (MAX_CONTAINERS - 1)),
        ('["%s"]' % ('[{\\"' * MAX_CONTAINERS), ['[{"' * MAX_CONTAINERS]),
        ("1" * 1000, int("1" * 1000)),
        ("[1e308, -0.0, 1E-999]", [1e308, 0.0, 0.0]),
        ('"\\ud83d\\ude00"', "😀"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_json(body, value):
    assert parse_body(body.encode()) == value


CHARACTERS = st.characters()  # lone surrogates too: JSON can spell them
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(CHARACTERS)
)
NAMES = st.sampled_from([*FIELDS, "role", "content", "stop"]) | st.text(CHARACTERS)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(NAMES, v), max_leaves=12)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]) | VALUES},
        optional={"content": st.text(CHARACTERS) | VALUES, "name": VALUES},
    )
)
BY_TYPE = {
    "string": st.text(CHARACTERS, min_size=1),
    "boolean": st.booleans(),
    "integer": st.integers(1, 50),
    "number": st.floats(0, 2),
    "array": MESSAGES,
}
BODIES = VALUES | st.fixed_dictionaries(
    {}, optional={name: BY_TYPE[s["type"]] | VALUES for name, s in FIELDS.items()}
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(BODIES)
def test_any_json_is_a_request_or_an_input_error(body):
    payload = parse_body(json.dumps(body).encode())
    assert payload == body
    try:
        request = check(payload)
    except SchemaError:
        return
    finally:
        assert payload == body, "checking leaves it as it was"
    assert set(request.fields) <= FIELDS.keys() & payload.keys()
    with contextlib.suppress(InputError):
        request.request()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(BODIES.map(json.dumps), st.data())
def test_corrupt_json_is_parsed_as_python_does_or_refused(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 3)))
    patch = data.draw(st.text('{}[]",:\\-+.0123456789eEINa \n\x00\xff', max_size=3))
    corrupted = text[:start] + patch + text[end:]
    try:
        value = parse_body(corrupted.encode())
    except InputError:
        return
    assert json.dumps(value) == json.dumps(json.loads(corrupted))


def test_a_key_given_twice_is_found_among_very_many():
    """In time that grows with their number, not with its square: then this would take an hour."""
    keys = ",".join(f'"{i}": 1' for i in range(300_000))
    with pytest.raises(InputError, match="the key '299999' is given twice"):
        parse_body(f'{{{keys},"299999": 2}}'.encode())


def test_of_very_many_ignored_fields_the_first_are_named():
    many = {f"field{i}": 1 for i in range(1000)}
    expected = [*(f"field{i}" for i in range(16)), "984 more"]
    assert check({"prompt": "hi", **many}).ignored == expected
