"""The Python interface, on the embedded demo model."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from llama_jax import InputError, Llama
from llama_jax.config import MAX_SLOTS
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.result import Usage
from llama_jax.text.tokenizer import BOS_ID, EOS_ID
from llama_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from llama_jax.weights.shards import tensors
from tests.helpers import reference
from tests.helpers.demo import load_demo
from tools.demo_corpus import read_corpus

QUESTION = {"prompt": "What is the capital of France?", "seed": 1}


@pytest.fixture(scope="module")
def llm():
    return load_demo()


def test_the_demo_answers_its_corpus(llm):
    """A seeded sample of questions and dialogues, word for word at temperature 0."""
    corpus, rng = read_corpus(), random.Random(0)
    assert len(corpus.questions) >= 300
    for phrasings, answer in rng.sample(corpus.questions, 25):
        result = llm.generate(prompt=rng.choice(phrasings), temperature=0)
        assert result.response == answer
        assert result.finish_reason == "stop"
    for dialogue in rng.sample(corpus.dialogues, 8):
        result = llm.generate(messages=dialogue[:-1], temperature=0)
        assert result.response == dialogue[-1]["content"]


def test_the_demo_is_what_the_readme_says(llm):
    size = sum(file.stat().st_size for file in DEMO_CHECKPOINT.rglob("*") if file.is_file())
    assert size < 6e6
    parameters = sum(a.size for a in jax.tree.leaves(llm.executor.params))
    assert 0.9e6 < parameters < 1.3e6
    assert llm.config.num_kv_heads < llm.config.num_heads
    assert not llm.config.tie_embeddings
    manifest = json.loads((DEMO_CHECKPOINT / "manifest.json").read_text())
    right, total = map(int, manifest["origin"]["answers_right"].split(" of "))
    assert right >= 0.98 * total


def test_result_fields(llm):
    result = llm.generate(**QUESTION)
    assert result.prompt_tokens[0] == BOS_ID
    assert result.tokens
    assert EOS_ID not in result.tokens
    assert result.response == llm.tokenizer.decode(result.tokens)
    counts = (len(result.prompt_tokens), len(result.tokens))
    assert result.usage == Usage(*counts, total_tokens=sum(counts), cached_tokens=0)
    assert (result.seed, result.finish_reason) == (1, "stop")
    assert all(value > 0 for value in dataclasses.astuple(result.timings)[3:])
    assert (result.logprobs, result.prompt_logprobs) == (None, None)
    assert result.fingerprint == llm.engine.fingerprint
    json.dumps(dataclasses.asdict(result))


@pytest.mark.parametrize("prompt", [QUESTION, {"prompt": "Once", "raw": True, "temperature": 2.0}])
def test_prompt_tokens_and_parameters_of_a_result_repeat_it(llm, prompt):
    first = llm.generate(**prompt)
    again = llm.generate(prompt_tokens=first.prompt_tokens, **first.parameters)
    assert (again.tokens, again.parameters) == (first.tokens, first.parameters)


def test_stream_can_be_paused_and_resumed(llm):
    stream = llm.stream(**QUESTION)
    with pytest.raises(RuntimeError, match="not been read to its end"):
        _ = stream.result
    first = next(stream)
    assert first + "".join(stream) == llm.generate(**QUESTION).response
    assert list(stream) == []
    assert stream.result.response == llm.generate(**QUESTION).response


@pytest.mark.parametrize("parameters", [{"max_tokens": 8}, {}, {"stop": "Paris"}])
def test_the_cache_is_allocated_once(llm, parameters, monkeypatch):
    """Whether a request ends by its limit, EOS or a stop string, the next takes over its state."""
    expected = llm.generate(**QUESTION).tokens
    llm.generate(**QUESTION, **parameters)
    abandoned = llm.stream(**QUESTION, ignore_eos=True)
    next(abandoned)
    del abandoned
    monkeypatch.setattr(llm.executor, "init_state", None)
    assert llm.generate(**QUESTION).tokens == expected


def test_generate_all_raises_the_error_of_one_request(llm):
    fits = {"prompt": "Hi", "seed": 1, "max_tokens": 3}
    results = llm.generate_all([fits, fits, {"prompt": "Hi", "max_tokens": 10_000}])
    assert [next(results).tokens for _ in range(2)] == [llm.generate(**fits).tokens] * 2
    with pytest.raises(InputError, match="max_tokens is 10,000, but the context holds 512"):
        next(results)
    assert list(llm.generate_all([fits]))  # and the engine goes on


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 8, 9, 10])
def test_max_tokens(llm, max_tokens):
    request = {"prompt": "Tell me a story.", "temperature": 0}
    whole = llm.generate(**request, max_tokens=64).tokens
    result = llm.generate(**request, max_tokens=max_tokens)
    assert result.tokens == whole[:max_tokens]
    assert result.finish_reason == "length"
    assert (result.timings.decode_tokens_per_s is None) == (max_tokens < 2)


def test_raw_is_bos_and_the_text(llm):
    result = llm.generate(prompt="[INST] Hi", raw=True, max_tokens=1)
    assert result.prompt_tokens == [BOS_ID, *llm.tokenizer.encode("[INST] Hi")]


def test_logits_equal_the_oracle(llm):
    tokens = llm.tokenizer.encode("The capital of France is Paris. " * 3)
    logits = llm.logits(tokens)
    assert logits.shape == (len(tokens), llm.config.vocab_size)
    assert logits.dtype == np.float32
    oracle = reference.logits(llm.executor.params, llm.config, tokens)
    np.testing.assert_allclose(logits, oracle, atol=1e-3)


def test_context_is_counted_before_running(llm):
    small = Llama.load(DEMO_CHECKPOINT, context=40)
    tokens = [1] * 39
    small.generate(prompt_tokens=tokens, max_tokens=1)
    with pytest.raises(InputError, match="prompt has 39 tokens and max_tokens is 2, but the conte"):
        small.generate(prompt_tokens=tokens, max_tokens=2)
    with pytest.raises(InputError, match="got 41 tokens, but the context holds 40"):
        small.logits([1] * 41)
    assert small.logits([1] * 40).shape[0] == 40


def test_the_whole_context_can_be_used(llm):
    result = llm.generate(prompt_tokens=[1] * 200, max_tokens=312, ignore_eos=True, seed=1)
    assert len(result.tokens) == 312
    tokens = [1] * 200 + result.tokens
    logits = llm.logits(tokens)
    assert np.isfinite(logits).all()
    greedy = llm.generate(prompt_tokens=tokens[:500], max_tokens=12, temperature=0, ignore_eos=True)
    assert greedy.tokens[0] == logits[499].argmax()


@pytest.mark.parametrize("context", [16, 64, 256])
def test_bits_do_not_depend_on_the_context(llm, context):
    tokens = list(range(3, 15))
    small = Llama.load(DEMO_CHECKPOINT, context=context)
    np.testing.assert_array_equal(small.logits(tokens), llm.logits(np.array(tokens)))


@pytest.mark.parametrize(("name", "most"), [("context", 512), ("slots", MAX_SLOTS)])
@pytest.mark.parametrize("value", [0, -1, "most + 1", True, 2.0, "2"])
def test_sizes_out_of_range(name, most, value, monkeypatch):
    monkeypatch.setattr("llama_jax.llama.load_checkpoint", None)  # it is reported before
    value = most + 1 if value == "most + 1" else value
    with pytest.raises(InputError, match=f"{name} is {value!r}, expected 1 to {most}"):
        Llama.load(DEMO_CHECKPOINT, **{name: value})


@pytest.mark.slow
def test_end_tokens_of_the_load_take_the_place_of_the_checkpoints(llm):
    whole = llm.generate(**QUESTION, temperature=0)
    end = whole.tokens[3]
    other = Llama.load(eos_tokens=[1023, end])
    assert other.generate(**QUESTION, temperature=0).tokens == whole.tokens[:3]
    longer = other.generate(**QUESTION, temperature=0, ignore_eos=True, max_tokens=5)
    assert longer.tokens == whole.tokens[:5]
    with pytest.raises(InputError, match=r"eos_tokens is \[5000\], expected .* = 1024"):
        Llama.load(eos_tokens=[5000])


def test_a_tokenizer_of_another_model(tmp_path):
    demo = load_checkpoint(DEMO_CHECKPOINT)
    config = dataclasses.replace(demo.config, vocab_size=100)
    params = demo.params | {name: demo.params[name][:100] for name in ("embed", "lm_head")}
    save_checkpoint(
        tmp_path / "odd", tensors(params), config, tokenizer=demo.tokenizer.read_bytes()
    )
    with pytest.raises(InputError, match="has 1,024 pieces, the model's vocab_size is 100"):
        Llama.load(tmp_path / "odd")


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.exhaustive)]
)
def test_half_precision_runs_give_the_same_answer(dtype):
    half = Llama.load(DEMO_CHECKPOINT, dtype=dtype)
    assert half.generate(**QUESTION, temperature=0).response == "The capital of France is Paris."


def test_weight_bytes_leave_out_the_embedding(llm):
    params = llm.executor.params
    total = sum(a.nbytes for a in jax.tree.leaves(params))
    assert llm.weight_bytes_per_token == total - params["embed"].nbytes
