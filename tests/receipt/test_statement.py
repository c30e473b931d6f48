"""A receipt says what was asked, what ran and what was drawn; its digests hold it together."""

import copy
import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.demo import SELFTEST
from llama_jax.engine.draw import Draw
from llama_jax.errors import InputError
from llama_jax.provenance.canonical import from_hex, to_hex
from llama_jax.provenance.chain import last_link, links
from llama_jax.receipt import read_receipts
from llama_jax.receipt.file import ReceiptFile
from llama_jax.text.tokenizer import EOS_ID
from tests.helpers import forgery
from tests.helpers.demo import load_demo

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def llm():
    return load_demo()


@pytest.fixture(scope="module")
def result(llm):
    return llm.generate(prompt=QUESTION, seed=2**64 - 1, temperature=2.0, top_k=7, top_p=0.9)


def test_it_says_all_that_decides_the_answer(llm, result):
    receipt = forgery.read(result.receipt())
    assert receipt.problems == []
    assert receipt.request() == result.record.request
    assert receipt.parameters == result.parameters
    assert (receipt.prompt_tokens, receipt.tokens) == (result.prompt_tokens, result.tokens)
    assert receipt.draws == result.record.draws
    assert (receipt.text, receipt.finish_reason) == (result.response, "stop")
    assert receipt.environment.parts == llm.engine.environment.parts
    assert receipt.environment.fingerprint == result.fingerprint
    # The draw that ended it is there.
    assert [draw.token for draw in receipt.draws] == [*result.tokens, EOS_ID]


def test_each_draw_has_its_margins(result):
    draws = result.record.draws
    assert all(draw.margin > 0 and draw.top_k_margin > 0 for draw in draws)
    assert all(0 <= draw.top_p_margin <= 1 and draw.min_p_margin == math.inf for draw in draws)


def test_a_private_one_has_neither_prompt_nor_text(result):
    open_, private = result.receipt(), result.receipt(private=True)
    text = json.dumps(private)
    assert "France" not in text
    assert "content" not in text
    assert "token" not in forgery.parts(private)[1]["draws"]
    receipt = forgery.read(private)
    assert receipt.problems == []
    assert receipt.is_private
    # The same run: equal digests, chain and numbers.
    assert [s["digest"] for s in private["subject"]] == [s["digest"] for s in open_["subject"]]
    inner = forgery.parts(private)[1], forgery.parts(open_)[1]
    assert inner[0]["chain"] == inner[1]["chain"]
    assert inner[0]["draws"]["logprob"] == inner[1]["draws"]["logprob"]


def test_seeds_beyond_what_json_numbers_hold(llm):
    for seed in (0, 2**53 + 1, 2**64 - 1):
        result = llm.generate(prompt=QUESTION, seed=seed, max_tokens=2)
        receipt = forgery.read(result.receipt())
        assert receipt.parameters.seed == seed
        assert receipt.problems == []


def test_made_up_weights_have_no_receipt(llm):
    nameless = dataclasses.replace(
        llm.generate(prompt=QUESTION, max_tokens=1).record,
        environment=dataclasses.replace(llm.engine.environment, parts={"weights": None}),
    )
    result = dataclasses.replace(llm.generate(prompt=QUESTION, max_tokens=1), record=nameless)
    with pytest.raises(InputError, match="the weights have no digest"):
        result.receipt()


def test_the_json_of_a_result_has_no_record(result):
    assert "record" not in result.to_dict()
    assert json.dumps(result.to_dict())


FLOAT32 = st.floats(allow_nan=False, width=32)


@given(FLOAT32)
def test_floats_are_written_exactly(value):
    assert from_hex(to_hex(value)) == value


@pytest.mark.parametrize("text", ["nan", "0x1.00000001p+0", "x", "0x1p+400"])
def test_what_is_no_float32_is_refused(text):
    with pytest.raises((ValueError, OverflowError)):
        from_hex(text)


DRAWS = st.lists(st.builds(Draw, st.integers(0, 2**31 - 1), *[FLOAT32] * 5), max_size=8)


@given(DRAWS, st.integers(0, 7))
def test_a_chain_tells_every_draw_and_its_place(draws, at):
    start = "ab" * 32
    whole = list(links(start, draws))
    assert whole[: at + 1] == list(links(start, draws[: at + 1]))  # a beginning can be checked
    if at < len(draws):
        changed = [*draws]
        changed[at] = draws[at]._replace(token=draws[at].token ^ 1)
        assert last_link(start, changed) != last_link(start, draws)


# Edited, without the digests.

EDITS = {
    "token": lambda external, internal: internal["draws"]["token"].__setitem__(0, 5),
    "logprob": lambda external, internal: internal["draws"]["logprob"].__setitem__(0, "-0x1p-3"),
    "margin": lambda external, internal: internal["draws"].update(
        margin=["0x1p+1"] * len(internal["draws"]["token"])
    ),
    "link": lambda external, internal: internal["chain"].update(end="0" * 64),
    "seed": lambda external, internal: external["parameters"].update(seed="8"),
    "temperature": lambda external, internal: external["parameters"].update(temperature=1.0),
    "prompt": lambda external, internal: external["prompt"]["messages"][0].update(content="x"),
    "prompt's ids": lambda external, internal: internal["promptTokens"].append(3),
    "weights": lambda external, internal: internal["environment"].update(weights="0" * 64),
    "version": lambda external, internal: internal["environment"]["versions"].update(jax="9"),
    "fingerprint": lambda external, internal: internal.update(fingerprint="fp_0"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_shows_in_its_digests(result, edit):
    statement = copy.deepcopy(result.receipt())
    edit(*forgery.parts(statement))
    assert forgery.read(statement).problems


def test_an_edited_subject_or_dependency_shows(result):
    statement = result.receipt()
    forgery.set_subject(statement, "text", "Lyon.")
    statement["subject"][1]["digest"]["sha256"] = "0" * 64
    statement["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"] = {}
    problems = forgery.read(statement).problems
    assert any("text" in problem for problem in problems)
    assert any("weights" in problem for problem in problems)


# Files.


def test_a_file_holds_one_or_a_line_each(result, tmp_path):
    statement = result.receipt()
    indented = tmp_path / "one.json"
    indented.write_text(json.dumps(statement, indent=2))
    lines = tmp_path / "lines.jsonl"
    for _ in range(2):
        file = ReceiptFile(lines)
        file.append(result)
        file.append_row({"line": 1, "sha256": "x"}, [result, result])
        file.append_row({"line": 2, "sha256": "y"}, [])
        file.close()
    for path, count in ((indented, 1), (lines, 6)):
        receipts = list(read_receipts(path))
        assert len(receipts) == count
        assert all(receipt.draws == result.record.draws for receipt in receipts)


def test_a_file_is_resumed_where_its_results_end(result, tmp_path):
    path = tmp_path / "lines.jsonl"
    file = ReceiptFile(path)
    for line in (1, 2, 3):
        file.append_row({"line": line}, [result])
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"line": 4')
    file = ReceiptFile(path)
    file.resume(2)
    file.append_row({"line": 3}, [])
    file.close()
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [1, 2, 3]
    with (
        ReceiptFile(path) as file,
        pytest.raises(InputError, match="3 receipts, but the output has 4 results"),
    ):
        file.resume(4)


def without(*path):
    def edit(statement):
        for name in path[:-1]:
            statement = statement[name]
        del statement[path[-1]]

    return edit


def with_(value, *path):
    def edit(statement):
        for name in path[:-1]:
            statement = statement[name]
        statement[path[-1]] = value

    return edit


DEFINITION = ("predicate", "buildDefinition")
MALFORMED = {
    "no predicate": without("predicate"),
    "another predicate": with_("https://slsa.dev/provenance/v2", "predicateType"),
    "no draws": without(*DEFINITION, "internalParameters", "draws"),
    "a token of text": with_(["x"], *DEFINITION, "internalParameters", "draws", "token"),
    "columns of two lengths": with_([], *DEFINITION, "internalParameters", "draws", "token"),
    "no float": with_(["x"], *DEFINITION, "internalParameters", "draws", "logprob"),
    "a huge seed": with_("9" * 20, *DEFINITION, "externalParameters", "parameters", "seed"),
    "no prompt": with_({}, *DEFINITION, "externalParameters", "prompt"),
    "two prompts": with_(
        {"raw_prompt": "x", "messages": []}, *DEFINITION, "externalParameters", "prompt"
    ),
    "an unknown field of the prompt": with_(
        {"raw_prompt": "x", "y": True}, *DEFINITION, "externalParameters", "prompt"
    ),
    "half private": with_({"sha256": "0" * 64}, *DEFINITION, "externalParameters", "prompt"),
    "no EOS": without(*DEFINITION, "internalParameters", "environment", "config", "eos_tokens"),
    "an integer beyond 2^53": with_(2**60, *DEFINITION, "internalParameters", "sizes", "slots"),
    "half a character": with_("\ud800", *DEFINITION, "internalParameters", "environment", "device"),
    "no base64": with_("%", "subject", 1, "content"),
    "no UTF-8": with_("/w==", "subject", 1, "content"),
}


@pytest.mark.parametrize("edit", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_receipt_is_one_clear_line(result, edit):
    statement = json.loads(json.dumps(result.receipt()))
    edit(statement)
    with pytest.raises(InputError, match="is no receipt"):
        forgery.read(statement)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "not JSON"),
        (b"[]", "is no receipt"),
        (b'{"receipts": 3}', "expected a list"),
        (b'{"payload": "%", "signatures": []}', "not base64"),
        (b"\x00" * 99, "not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_receipts(path))


def test_a_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            list(read_receipts(path))


def test_fields_that_are_not_known_are_ignored(result):
    statement = result.receipt()
    for place in (statement, statement["predicate"], forgery.parts(statement)[1]):
        place["x-other"] = 1
    assert forgery.read(statement).draws == result.record.draws


def test_the_shipped_runs_are_whole():
    receipts = list(read_receipts(SELFTEST))
    assert len(receipts) > 50
    assert all(receipt.problems == [] for receipt in receipts)
