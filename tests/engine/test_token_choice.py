"""Bias, mask and min-p of a request: what they do to its tokens, and to no other request's."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import InputError, Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.text.tokenizer import EOS_ID
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers.demo import load_demo

QUESTION = {"prompt": "Tell me a story.", "seed": 4, "max_tokens": 12, "ignore_eos": True}
TOKENS = (40, 300, 301, 555, 1000)
CHANGES = {
    "forced": {"logit_bias": {300: 100}},
    "biased": {"logit_bias": {300: 25, 40: 24.5, 13: -100}},
    "masked": {"allowed_tokens": TOKENS},
    "likely": {"min_p": 0.9},
    "all": {
        "logit_bias": {300: 5, 555: -100},
        "allowed_tokens": TOKENS,
        "min_p": 0.01,
        "top_k": 4,
        "top_p": 0.95,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
}


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=4)


@pytest.fixture(scope="module")
def single():
    return load_demo()


def greedy(llm, prompt, count, bias, allowed=None, repetition=1.0, frequency=0.0, presence=0.0):
    """The law of docs/sampler.md at temperature 0, from the model's own logits."""
    tokens, output = list(prompt), []
    while len(output) < count:
        x = llm.logits(tokens)[-1]
        for token, value in bias.items():
            x[token] += np.float32(value)
        if allowed is not None:
            x[[token for token in range(len(x)) if token not in allowed]] = -np.inf
        seen, counts = list(set(tokens)), np.bincount(output, minlength=len(x))
        x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
        x = x - frequency * counts - presence * (counts > 0)
        output.append(int(x.argmax()))
        tokens.append(output[-1])
    return output


@pytest.mark.parametrize("temperature", [0, 1, 5])
def test_a_bias_of_100_makes_a_token_certain(llm, temperature):
    for token in TOKENS:
        result = llm.generate(**QUESTION, temperature=temperature, logit_bias={token: 100})
        # At temperature 5 the lead of 100 is one of 20, less what other tokens lead by.
        if temperature < 5:
            assert result.tokens == [token] * 12
        else:
            assert result.tokens.count(token) > 6


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bias_of_minus_100_removes_a_token(llm, temperature):
    plain = llm.generate(**QUESTION, temperature=temperature)
    removed = dict.fromkeys(plain.tokens, -100)
    tokens = llm.generate(**QUESTION, temperature=temperature, logit_bias=removed).tokens
    assert not set(tokens) & set(removed)
    if not temperature:
        order = llm.logits(plain.prompt_tokens)[-1].argsort()[::-1]
        best, second = order[:2].tolist()
        assert plain.tokens[0] == best
        assert llm.generate(**QUESTION, temperature=0, logit_bias={best: -100}).tokens[0] == second


@pytest.mark.parametrize("temperature", [0, 1, 5])
def test_only_allowed_tokens_are_drawn(llm, temperature):
    request = QUESTION | {"max_tokens": 60, "temperature": temperature}
    drawn = set(llm.generate(**request, allowed_tokens=TOKENS).tokens)
    assert drawn <= set(TOKENS)
    if temperature == 5:
        assert len(drawn) > 1


def test_a_mask_is_exact_for_eos_too(llm):
    request = {"prompt": "What is the capital of France?", "temperature": 0, "max_tokens": 40}
    plain = llm.generate(**request)
    assert plain.finish_reason == "stop"
    without = llm.generate(**request, allowed_tokens=[*set(plain.tokens)])
    assert (without.finish_reason, len(without.tokens)) == ("length", 40)
    assert without.tokens[: len(plain.tokens)] == plain.tokens
    with_eos = llm.generate(**request, allowed_tokens=[EOS_ID, *set(plain.tokens)])
    assert (with_eos.tokens, with_eos.finish_reason) == (plain.tokens, "stop")
    alone = llm.generate(**request, allowed_tokens=[EOS_ID])
    assert (alone.tokens, alone.finish_reason) == ([], "stop")


def test_min_p_of_1_leaves_the_most_likely_token(llm):
    for seed in range(4):
        request = QUESTION | {"seed": seed}
        assert (
            llm.generate(**request, temperature=2, min_p=1).tokens
            == llm.generate(**request, temperature=0).tokens
        )


@pytest.mark.parametrize(
    "penalties",
    [
        {},
        {"repetition": 1.7},
        {"frequency": 1.5, "presence": 0.5},
        {"repetition": 0.6, "frequency": 2.0},
    ],
)
@pytest.mark.parametrize("allowed", [None, TOKENS])
def test_the_bias_comes_before_the_penalties(llm, penalties, allowed):
    """Forced tokens give way once the penalties of their repetitions exceed the bias."""
    bias = {300: 8.0, 40: 6.0, 555: 5.0, 301: -3.0}
    result = llm.generate(
        **QUESTION,
        temperature=0,
        logit_bias=bias,
        allowed_tokens=allowed,
        **{f"{name}_penalty": value for name, value in penalties.items()},
    )
    expected = greedy(llm, result.prompt_tokens, 12, bias, allowed, **penalties)
    assert result.tokens == expected


def test_logprobs_are_the_model_s_without_bias_and_mask(llm):
    plain = llm.generate(**QUESTION, temperature=0, logprobs=5)
    biased = llm.generate(**QUESTION, logprobs=5, logit_bias={300: 100}, allowed_tokens=TOKENS)
    assert biased.logprobs[0].top == plain.logprobs[0].top
    assert biased.logprobs[0].logprob < plain.logprobs[0].logprob


@pytest.mark.parametrize("temperature", [0, 5])
def test_requests_beside_one_another_are_each_as_alone(llm, single, temperature):
    requests = [QUESTION | {"seed": i} | change for i, change in enumerate(CHANGES.values())]
    plain = [QUESTION | {"seed": i} for i in range(len(requests))]
    mixed = [
        request | {"temperature": temperature}
        for pair in zip(requests, plain, strict=True)
        for request in pair
    ]
    expected = [single.generate(**request).tokens for request in mixed]
    assert [result.tokens for result in llm.generate_all(mixed)] == expected
    differ = [ours != theirs for ours, theirs in zip(expected[::2], expected[1::2], strict=True)]
    assert all(differ) or temperature == 0


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_request_in_the_slot_is_as_alone(llm, single, name):
    """With the same prompt, which is reused, and with another."""
    for request in (QUESTION | {"temperature": 1}, QUESTION | {"prompt": "Hi", "temperature": 0}):
        expected = llm.generate(**request).tokens
        changed = single.generate(**request, **CHANGES[name]).tokens
        assert single.generate(**request).tokens == expected
        assert single.generate(**request, **CHANGES[name]).tokens == changed


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_of_a_result_repeat_it_and_streams_are_the_same(llm, name):
    first = llm.generate(**QUESTION, temperature=1, **CHANGES[name])
    effective = json.loads(json.dumps(dataclasses.asdict(first)))["parameters"]
    for parameters in (first.parameters, effective):
        again = llm.generate(prompt_tokens=first.prompt_tokens, **parameters)
        assert (again.tokens, again.parameters) == (first.tokens, first.parameters)
    stream = llm.stream(**QUESTION, temperature=1, **CHANGES[name])
    next(stream)
    assert "".join(stream) in first.response
    assert stream.result.tokens == first.tokens


@pytest.fixture(scope="module")
def padded():
    """The demo model with 6 ids more than its tokenizer has pieces."""
    demo = load_checkpoint(DEMO_CHECKPOINT)
    params = demo.params | {
        name: jnp.pad(demo.params[name], ((0, 6), (0, 0))) for name in ("embed", "lm_head")
    }
    config = dataclasses.replace(demo.config, vocab_size=demo.config.vocab_size + 6)
    return dataclasses.replace(demo, config=config, params=params)


@pytest.fixture(scope="module")
def padded_llm(padded):
    return Llama(padded)


@pytest.mark.parametrize("token", [1024, 1029, 1030, 10**9])
def test_ids_that_cannot_be_drawn_are_refused_by_name(padded_llm, token):
    llm = padded_llm
    expected = f"has the token id {token}, expected ids from 0 to 1023"
    for parameters in (
        {"logit_bias": {5: 1, token: 1}},
        {"allowed_tokens": [5, token]},
        {"allowed_tokens": [token]},
    ):
        [name] = parameters
        with pytest.raises(InputError, match=f"{name} {expected}"):
            llm.stream(prompt="Hi", **parameters)
    assert llm.engine.queued == llm.engine.running == 0
    assert llm.generate(**QUESTION, allowed_tokens=[1023]).tokens == [1023] * 12


@pytest.mark.slow
def test_without_a_tokenizer_every_id_of_the_vocabulary_can_be_drawn(padded):
    llm = Llama(dataclasses.replace(padded, tokenizer=None))
    request = {"prompt_tokens": [1, 5], "max_tokens": 3}
    assert llm.generate(**request, allowed_tokens=[1029]).tokens == [1029] * 3
    with pytest.raises(InputError, match="token id 1030, expected ids from 0 to 1029"):
        llm.generate(**request, allowed_tokens=[1030])
