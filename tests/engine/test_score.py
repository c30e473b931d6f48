"""Likelihoods: transformers' loss, Hugging Face's windows, and what is refused."""

import dataclasses
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from convert.__main__ import main
from llama_jax import InputError, Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.score import Likelihood, cut_windows
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers import ROOT
from tests.helpers.stories import BOS, PUBLISHED

QUESTION = "[INST] What is the capital of France? [/INST]"


@pytest.fixture(scope="module")
def llm():
    return Llama.load(DEMO_CHECKPOINT, context=64)


def guides_windows(length, context, stride):
    """What Hugging Face's guide to the perplexity of fixed-length models computes.

    Returns:
        (begin, end, target): of tokens[begin:end] the loss counts tokens[target:end].
    """
    windows, previous = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        labels = [-100] * (end - begin)
        for place in range(len(labels) - (end - previous), len(labels)):
            labels[place] = begin + place
        scored = [label for label in labels[1:] if label != -100]  # as the model's loss shifts them
        if scored:
            windows.append((begin, end, scored[0]))
        previous = end
        if end == length:
            break
    return windows


@hypothesis.given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_are_those_of_hugging_faces_guide(length, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(cut_windows(length, 0, context, stride))
    assert windows == guides_windows(length, context, stride)
    scored = [i for _, end, target in windows for i in range(target, end)]
    assert len(scored) == len(set(scored))
    if stride < context:
        assert scored == list(range(1, length))
    first = data.draw(st.integers(0, length))
    continuation = [
        i
        for _, end, target in cut_windows(length, first, context, stride)
        for i in range(target, end)
    ]
    assert continuation == [i for i in scored if i >= first]


@pytest.mark.parity
@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize(
    ("model", "context"),
    [("demo", 64), pytest.param("demo", 512, marks=pytest.mark.exhaustive), ("stories260k", 512)],
)
def test_a_text_has_transformers_loss(model, context, request, tmp_path):
    """Within 1e-4 nats a token in float32, in one window and in several."""
    import torch
    from transformers import LlamaForCausalLM

    checkpoint, source, text = DEMO_CHECKPOINT, tmp_path / "hf", PUBLISHED
    if model == "demo":
        text = (ROOT / "tools" / "corpus" / "questions.txt").read_text("utf-8")[5000:5900]
        assert main(["export-hf", str(checkpoint), str(source)]) == 0
    else:
        source = request.getfixturevalue("assets") / "stories260k" / "hf"
        checkpoint = tmp_path / "jax"
        assert main(["hf", str(source), str(checkpoint)]) == 0
    theirs = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours = Llama.load(checkpoint, dtype="float32", context=context)
    tokens = [BOS, *ours.tokenizer.encode(text)]
    for stride in (context // 2, context):
        losses = []
        for begin, end, target in guides_windows(len(tokens), context, stride):
            inputs = torch.tensor([tokens[begin:end]])
            labels = inputs.clone()
            labels[:, : target - begin] = -100
            with torch.no_grad():
                mean = theirs(inputs, labels=labels).loss
            losses.append(float(mean) * (end - target))
        score = ours.score(text, stride=stride)
        assert score.nats_per_token == pytest.approx(sum(losses) / score.num_tokens, abs=1e-4)
        assert score.tokens == ours.score(tokens, stride=stride).tokens
        if stride < context:
            assert score.tokens == tokens[1:]
            assert score.num_bytes == len(text.encode())


def test_a_score_is_read_off_the_logits(llm):
    text = "Tom's café: 日本 😀"
    tokens = [1, *llm.tokenizer.encode(text)]
    logits = np.asarray(llm.logits(tokens), np.float64)
    table = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    score = llm.score(text)
    expected = [table[i, token] for i, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(score.token_logprobs, expected, atol=1e-4)
    assert score.tokens == tokens[1:]
    assert score.num_tokens == len(expected)
    assert score.logprob == pytest.approx(sum(expected), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-score.logprob / len(expected)))
    assert score.bits_per_byte == pytest.approx(-score.logprob / math.log(2) / len(text.encode()))
    assert not score.is_greedy
    assert score.fingerprint == llm.engine.fingerprint


def test_a_continuation_is_scored_given_its_text(llm):
    """Spaces at the end of the text count to the continuation, as lm-evaluation-harness has it."""
    answer = llm.generate(prompt=QUESTION, raw=True, temperature=0, max_tokens=20)
    text = f" {answer.response}"  # a response begins without its space
    score = llm.score(QUESTION, text)
    assert score.is_greedy
    assert score.tokens == answer.tokens
    assert score.num_bytes == len(text)
    assert llm.score(f"{QUESTION}  ", "x").tokens == llm.score(QUESTION, "  x").tokens
    context, whole = (
        [1, *llm.tokenizer.encode(QUESTION)],
        [1, *llm.tokenizer.encode(QUESTION + " No")],
    )
    by_ids = llm.score(context, whole[len(context) :])
    assert by_ids == llm.score(QUESTION, " No")
    assert llm.score("", "Paris") == llm.score("Paris")
    assert llm.score([], [1, 500]) == llm.score([1, 500])


def test_a_long_context_leaves_only_the_continuations_tokens(llm):
    """In windows that begin within the context."""
    tokens = [1, *np.random.default_rng(0).integers(3, llm.config.vocab_size, 199).tolist()]
    score = llm.score(tokens[:180], tokens[180:], stride=10)
    assert score.tokens == tokens[180:]
    assert score.token_logprobs == llm.score(tokens, stride=10).token_logprobs[-20:]


def test_control_pieces_are_letters_unless_parsed(llm):
    dialog = f"<s>{QUESTION} Paris.</s>"
    [bos, eos] = llm.score(dialog).warnings
    assert "contains <s>, which is plain text" in bos
    assert "contains </s>, which is plain text" in eos
    parsed = llm.score(dialog, parse_control=True)
    assert parsed.warnings == []
    assert parsed.tokens == [*llm.tokenizer.encode(f"{QUESTION} Paris."), 2]
    assert parsed.num_bytes == len(f"{QUESTION} Paris.")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([""], "the text is empty, expected at least 1 character or token id"),
        ([[]], "the text is empty, expected at least 1"),
        (["a", ""], "continuation is empty, expected at least 1"),
        ([[1]], "there is nothing to score: 1 tokens in a context of 64"),
        ([7], "the text is 7, expected a string or a list of token ids"),
        ([b"x"], "the text is b'x', expected a string"),
        (["a", [1]], "of two kinds, expected two texts or two lists"),
        ([[1, -5]], r"the ids to score\[1\] is -5, expected a token id from 0"),
        ([[1, 9999], [1]], r"text\[1\] is 9999, expected a token id"),
        (["\ud800"], "lone surrogate"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm, arguments, problem):
    with pytest.raises(InputError, match=problem):
        llm.score(*arguments)


@pytest.mark.parametrize("stride", [0, -1, 65, 2.0, True, "1"])
def test_a_stride_out_of_range_is_refused(llm, stride):
    with pytest.raises(InputError, match=r"stride is .*, expected an integer from 1 to 64"):
        llm.score("a b", stride=stride)


def test_without_a_tokenizer_ids_are_scored():
    bare = Llama(dataclasses.replace(load_checkpoint(DEMO_CHECKPOINT), tokenizer=None), context=64)
    score = bare.score([1, 500, 600])
    assert (score.tokens, score.num_bytes, score.bits_per_byte) == ([500, 600], None, None)
    with pytest.raises(InputError, match=r"no tokenizer\.model"):
        bare.score("a")


def test_a_perplexity_beyond_a_float_is_infinite():
    assert Likelihood(logprob=-1e5, num_tokens=1, num_bytes=1).perplexity == math.inf
