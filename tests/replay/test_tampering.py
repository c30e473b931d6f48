"""Each way to tamper with a run or its receipt is judged as what it is."""

import contextlib
import copy
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.decode import sampling
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.replay import replay
from llama_jax.replay.verdict import Judgement, Outcome
from llama_jax.text import chat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers import forgery

pytestmark = pytest.mark.slow

REQUESTS = (
    {"prompt": "Tell me a story.", "temperature": 3.0, "seed": 5, "max_tokens": 40},
    {
        "prompt": "What is a fox?",
        "temperature": 2.5,
        "seed": 8,
        "max_tokens": 30,
        "top_p": 0.95,
        "frequency_penalty": 0.3,
    },
)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def llm(checkpoint):
    return Llama(checkpoint, slots=4, reuse=False)


@contextlib.contextmanager
def other_weights(llm, change):
    """Let a model run on other weights, and call them what they were."""
    honest = llm.executor.params
    llm.executor.params = jax.tree_util.tree_map_with_path(change, honest)
    try:
        yield
    finally:
        llm.executor.params = honest


def receipts_of(llm):
    return [result.receipt() for result in llm.generate_all(REQUESTS)]


@pytest.fixture(scope="module")
def receipts(llm):
    return receipts_of(llm)


def verdicts(llm, statements):
    """The verdicts of running them again, which are those of one pass."""
    found = [list(replay(llm, map(forgery.read, statements), prefill=p)) for p in (False, True)]
    for ran, read in zip(*found, strict=True):
        assert (ran.outcome, ran.judgement) == (read.outcome, read.judgement)
        assert (ran.divergence, ran.reasons) == (read.divergence, read.reasons)
    return found[0]


def assert_judged(llm, statements, judgement):
    for verdict in verdicts(llm, statements):
        assert (verdict.outcome, verdict.judgement) == (Outcome.DIVERGED, judgement), str(verdict)


def test_what_was_not_touched_is_exact(llm, receipts):
    assert [each.outcome for each in verdicts(llm, receipts)] == [Outcome.EXACT] * 2


# Another model.


def flipped(path, array):
    """One exponent bit of one weight."""
    if jax.tree_util.keystr(path) != "['layer_1']['feed_forward']['up']":
        return array
    bits = np.asarray(array).view(np.uint32).copy()
    bits[7, 11] ^= 1 << 27
    return jnp.asarray(bits.view(np.float32))


def scaled(path, array):
    return array * 1.05 if "lm_head" in jax.tree_util.keystr(path) else array


def in_bfloat16(path, array):
    return array.astype(jnp.bfloat16).astype(jnp.float32)


def in_int8(path, array):
    scale = jnp.max(jnp.abs(array), axis=-1, keepdims=True) / 127
    return jnp.round(array / scale) * scale


@pytest.mark.parametrize("change", [flipped, scaled, in_bfloat16, in_int8])
def test_other_weights_under_an_honest_root(llm, receipts, change):
    with other_weights(llm, change):
        theirs = receipts_of(llm)
        assert_judged(llm, receipts, Judgement.ANOTHER_MODEL)
    assert_judged(llm, theirs, Judgement.ANOTHER_MODEL)


@pytest.mark.parametrize(
    ("part", "value"), [("weights", "0" * 64), ("dtype", "bfloat16"), ("config", {})]
)
def test_what_says_that_it_is_another_is_named(llm, receipts, part, value):
    theirs = copy.deepcopy(receipts)
    for statement in theirs:
        environment = forgery.parts(statement)[1]["environment"]
        if part == "config":
            value = environment["config"] | {"norm_eps": 1e-6}
        environment[part] = value
    assert_not_replayable(llm, [forgery.sealed(each) for each in theirs], part)


def assert_not_replayable(llm, statements, name):
    for verdict in verdicts(llm, statements):
        assert verdict.outcome is Outcome.NOT_REPLAYABLE
        assert any(name in reason for reason in verdict.reasons), verdict.reasons


# Another tokenizer or template.


def swapped(model: bytes) -> bytes:
    """A tokenizer in which two pieces of the answers have changed places."""
    first, second = "▁in".encode(), "▁to".encode()
    at = [model.index(b"\x0a" + bytes([len(piece)]) + piece) + 2 for piece in (first, second)]
    data = bytearray(model)
    data[at[0] : at[0] + len(first)], data[at[1] : at[1] + len(second)] = second, first
    return bytes(data)


def test_two_pieces_of_the_tokenizer(llm, checkpoint, receipts, monkeypatch):
    model = swapped(pathlib.Path(checkpoint.tokenizer).read_bytes())
    with monkeypatch.context() as patch:  # under the honest digest
        patch.setattr(llm.engine, "tokenizer", Tokenizer(model))
        theirs = receipts_of(llm)
    assert_judged(llm, theirs, Judgement.EDITED)
    for statement in theirs:
        environment = forgery.parts(statement)[1]["environment"]
        environment["tokenizer"] = hashlib.sha256(model).hexdigest()
    assert_not_replayable(llm, [forgery.sealed(each) for each in theirs], "tokenizer.model")


def test_another_template(llm, receipts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("llama_jax.provenance.statement.CHAT_TEMPLATE", chat.CHAT_TEMPLATE + " ")
        theirs = receipts_of(llm)
    assert_not_replayable(llm, theirs, "template")
    forged = copy.deepcopy(receipts)  # ids of another template, under the honest digest
    for statement in forged:
        ids = forgery.parts(statement)[1]["promptTokens"]
        ids[1], ids[2] = ids[2], ids[1]
    assert_judged(llm, [forgery.sealed(each) for each in forged], Judgement.EDITED)


def test_another_version_of_the_law(llm, receipts):
    theirs = copy.deepcopy(receipts)
    for statement in theirs:
        forgery.parts(statement)[1]["environment"]["sampler"] += 1
    assert_not_replayable(llm, [forgery.sealed(each) for each in theirs], "sampling law")


# Another sampler.


@pytest.mark.parametrize(
    "change", [{"seed": "6"}, {"temperature": 3.1}, {"top_p": 0.5}, {"frequency_penalty": 1.0}]
)
def test_another_seed_or_parameter(llm, receipts, change):
    forged = copy.deepcopy(receipts)
    for statement in forged:
        forgery.parts(statement)[0]["parameters"].update(change)
    assert_judged(llm, [forgery.sealed(each) for each in forged], Judgement.ANOTHER_SAMPLER)


def test_another_constant_of_the_law(llm, checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        uniform = sampling._open_unit
        patch.setattr(sampling, "_open_unit", lambda bits: uniform(bits) * jnp.float32(0.999))
        other = Llama(checkpoint)
        theirs = [other.generate(**REQUESTS[0]).receipt()]
    assert_judged(llm, theirs, Judgement.ANOTHER_SAMPLER)


# Edited.


def edited(statement, edit, *, seal):
    statement = copy.deepcopy(statement)
    edit(statement, forgery.parts(statement)[1]["draws"])
    return forgery.sealed(statement) if seal else statement


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("at", [0, 1, 17, -1])
def test_a_token(llm, receipts, seal, at):
    def edit(statement, draws):
        draws["token"][at] = 300 if draws["token"][at] != 300 else 301
        if seal:
            ids = [token for token in draws["token"] if token != 2]
            forgery.set_subject(statement, "text", llm.tokenizer.decode(ids))

    statements = [edited(receipts[0], edit, seal=seal)]
    assert_judged(llm, statements, Judgement.EDITED)
    if seal:
        (verdict,) = verdicts(llm, statements)
        assert verdict.divergence.at == at % 40
        assert verdict.divergence.recorded in (300, 301)


@pytest.mark.parametrize("column", ["logprob", "margin"])
@pytest.mark.parametrize("seal", [False, True])
def test_a_number(llm, receipts, column, seal):
    def edit(statement, draws):
        draws[column][3] = "-0x1.8p+0"

    assert_judged(llm, [edited(each, edit, seal=seal) for each in receipts], Judgement.EDITED)


@pytest.mark.parametrize("seal", [False, True])
def test_the_text(llm, receipts, seal):
    def edit(statement, draws):
        subject = copy.deepcopy(statement["subject"])
        forgery.set_subject(statement, "text", "Something else.")
        if not seal:
            statement["subject"][1]["digest"] = subject[1]["digest"]

    assert_judged(llm, [edited(each, edit, seal=seal) for each in receipts], Judgement.EDITED)


def test_a_digest(llm, receipts):
    def edit(statement, draws):
        forgery.parts(statement)[1]["chain"]["end"] = "0" * 64

    assert_judged(llm, [edited(each, edit, seal=False) for each in receipts], Judgement.EDITED)


@pytest.mark.parametrize("seal", [False, True])
def test_a_receipt_that_is_cut_off(llm, receipts, seal):
    def edit(statement, draws):
        for column in draws.values():
            del column[20:]
        if seal:
            text = llm.tokenizer.decode(draws["token"])
            forgery.set_subject(statement, "text", text)

    assert_judged(llm, [edited(each, edit, seal=seal) for each in receipts], Judgement.EDITED)


def test_a_beginning_that_says_it_is_one_is_exact(llm):
    stream = llm.stream(**REQUESTS[0])
    next(stream)
    stream.close()
    for _ in stream:
        pass
    statement = stream.result.receipt()
    assert forgery.parts(statement)[1]["finishReason"] == "cancelled"
    assert [each.outcome for each in verdicts(llm, [statement])] == [Outcome.EXACT]


def test_a_token_that_does_not_exist(llm, receipts):
    def edit(statement, draws):
        draws["token"][3] = 5000

    assert_judged(llm, [edited(receipts[0], edit, seal=True)], Judgement.EDITED)


def test_parameters_that_the_model_refuses(llm, receipts):
    forged = copy.deepcopy(receipts)
    for statement in forged:
        forgery.parts(statement)[0]["parameters"].update(allowed_tokens=[5000])
    assert_judged(llm, [forgery.sealed(each) for each in forged], Judgement.EDITED)


def test_a_private_receipt_is_not_run(llm):
    result = llm.generate(**REQUESTS[0])
    assert_not_replayable(llm, [result.receipt(private=True)], "private")


def test_a_run_that_does_not_fit_is_not_run(checkpoint, receipts):
    assert_not_replayable(Llama(checkpoint, context=32), receipts, "context")


def test_verdicts_as_statements(llm, receipts):
    exact, diverged = verdicts(
        llm,
        [
            receipts[0],
            edited(receipts[0], lambda s, d: d["token"].__setitem__(4, 300), seal=False),
        ],
    )
    first, second = exact.to_statement(), diverged.to_statement()
    assert json.loads(json.dumps(first))["predicate"]["properties"] == ["LLAMA_JAX_REPLAY_EXACT"]
    assert second["predicate"]["properties"] == []
    assert second["predicate"]["llamaJax"]["judgement"] == "EDITED"
    assert [s["digest"] for s in first["subject"]] == [s["digest"] for s in receipts[0]["subject"]]
    assert "EXACT | 40 draws" in str(exact)
