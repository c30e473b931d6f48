"""A model on several devices against one: run by tests/test_sharding.py in a process of eight.

With the CPU kernels logits, tokens and log-probabilities are equal in bits. Without them XLA adds
the products of some parts of a weight in another order than those of the whole.
"""

import dataclasses
import json
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert
from llama_jax import Llama
from llama_jax.config import ModelConfig
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import choose_plan
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError
from llama_jax.nn.sharding import choose_shards, make_mesh
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers import ROOT
from tests.helpers.models import SMALL, random_params
from tests.helpers.quantization import quantized, quantized_params
from tests.helpers.serving import CHAT, MODEL, RUN, serving

DTYPES = ("float32", "float16", "bfloat16")

BASE = dataclasses.replace(SMALL, vocab_size=320, dim=128, ffn_dim=352, num_heads=8, num_kv_heads=8)
SHAPES = {
    "mha": BASE,
    "gqa": dataclasses.replace(BASE, num_kv_heads=4),
    "mqa": dataclasses.replace(BASE, num_kv_heads=1),
    "tied": dataclasses.replace(BASE, num_kv_heads=2, tie_embeddings=True),
    "odd vocabulary": dataclasses.replace(BASE, num_kv_heads=2, vocab_size=321),
}


def executor(config, params, dtype, devices, **sizes) -> Executor:
    sizes = {"batch": 1, "context": config.max_seq_len} | sizes
    mesh = make_mesh(choose_shards(config, devices), jax.devices()[:devices])
    plan = choose_plan(config, dtype)
    return Executor(config, params, dtype, mesh=mesh, plan=plan, **sizes)


def check_logits(config: ModelConfig, params, dtype) -> None:
    """Compare the bits of every logit of a text, on each number of devices that divides."""
    text = np.random.default_rng(1).integers(3, config.vocab_size, 60).tolist()
    expected = executor(config, params, dtype, 1).logits(text)
    tried = []
    for devices in (2, 4, 8):
        try:
            ex = executor(config, params, dtype, devices)
        except InputError:
            continue
        got = ex.logits(text)
        np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))
        tried.append(devices)
    assert 4 in tried


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gqa", "float32"), ("gqa", "bfloat16"), *((name, "float16") for name in SHAPES)],
)
def test_logits_of_random_shapes(native_kernels, name, dtype):
    check_logits(SHAPES[name], random_params(SHAPES[name], jnp.dtype(dtype)), dtype)


@pytest.mark.parametrize("name", ["gqa", "mqa"])
def test_logits_of_int8_weights(native_kernels, name):
    """Scales are split as the outputs are."""
    check_logits(quantized(SHAPES[name]), quantized_params(SHAPES[name]), "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_stories260k(native_kernels, assets, tmp_path, dtype):
    source = str(assets / "stories260k" / "hf")
    assert convert(["hf", source, str(tmp_path / "out")]) == 0
    checkpoint = load_checkpoint(tmp_path / "out", dtype)
    check_logits(checkpoint.config, checkpoint.params, dtype)


def draw_requests(count):
    rng = random.Random(5)
    return [
        {
            "prompt_tokens": [
                1,
                *(rng.randrange(3, 1000) for _ in range(rng.choice([1, 20, 150]))),
            ],
            "seed": seed,
            "max_tokens": rng.choice([0, 1, 9, 30]),
            "temperature": rng.choice([0, 0.6, 2.0]),
            "top_p": rng.choice([None, 0.9]),
            "top_k": rng.choice([None, 40]),
            "repetition_penalty": rng.choice([1, 1.3]),
            "logprobs": 3,
            "prompt_logprobs": rng.random() < 0.2,
            "ignore_eos": True,
        }
        for seed in range(count)
    ]


def answers(llm, requests):
    return [
        (result.tokens, result.finish_reason, repr(result.logprobs), repr(result.prompt_logprobs))
        for result in llm.generate_all(requests)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_mixed_requests(native_kernels, dtype):
    """Tokens, log-probabilities of answers and prompts, and the fingerprint."""
    requests = draw_requests(50)
    sizes = {"dtype": dtype, "context": 256}
    one = Llama.load(DEMO_CHECKPOINT, **sizes)
    expected = answers(one, requests)
    for devices in (2, 4) if dtype == "float16" else (4,):
        llm = Llama.load(DEMO_CHECKPOINT, **sizes, slots=2, devices=devices)
        assert answers(llm, requests) == expected
        assert llm.engine.fingerprint == one.engine.fingerprint


def test_batch_and_server_say_the_same(native_kernels, tmp_path):
    asked = [{"prompt": "Tell me a story.", "seed": seed, "max_tokens": 20} for seed in range(1, 7)]
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in asked))
    texts = {}
    for devices in ("1", "4"):
        out = tmp_path / f"out{devices}.jsonl"
        files = (f"--input={given}", f"--output={out}")
        run = [sys.executable, "run.py", "batch", *files, f"--devices={devices}"]
        subprocess.run(run, cwd=ROOT, check=True)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        texts[devices] = [line["result"]["response"] for line in lines]
    assert texts["1"] == texts["4"]
    with serving(Llama.load(DEMO_CHECKPOINT, slots=2, devices=4)) as client:
        served = [client.post(RUN, json=line).json()["result"]["response"] for line in asked]
        assert served == texts["1"]
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": MODEL, "messages": messages, "temperature": 0}
        [choice] = client.post(CHAT, json=body).json()["choices"]
        assert choice["message"]["content"] == "The capital of France is Paris."


def test_each_device_holds_its_part():
    """The demo model has 2 key/value heads: of 4 devices two share one."""
    one, four = (Llama.load(DEMO_CHECKPOINT, devices=devices) for devices in (1, 4))
    assert (four.executor.mesh.shape["kv"], four.executor.mesh.shape["group"]) == (2, 2)
    layer, whole = (llm.executor.params["layer_0"]["attention"] for llm in (four, one))
    for name, parts in (("q", 4), ("k", 2), ("v", 2), ("o", 4)):
        held = [shard.data for shard in layer[name].addressable_shards]
        assert [part.nbytes for part in held] == [whole[name].nbytes // parts] * 4
    cache = four.executor.init_state().cache[0].k
    assert [shard.data.shape for shard in cache.addressable_shards] == [(1, 1, 512, 32)] * 4
    parts = four.weight_bytes_per_token / one.weight_bytes_per_token
    assert 1 / 4 < parts < 0.27  # keys and values are in halves, norms whole


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_without_the_kernels_the_tokens_are_the_same(monkeypatch, dtype):
    """Logits differ by 1e-5 of their standard deviation in float32, 7e-4 in float16."""
    monkeypatch.setattr("llama_jax.decode.plan.has_kernels", lambda: False)
    requests = draw_requests(8)
    sizes = {"dtype": dtype, "context": 256, "slots": 2}
    one, four = (Llama.load(DEMO_CHECKPOINT, **sizes, devices=devices) for devices in (1, 4))
    tokens = [[result.tokens for result in llm.generate_all(requests)] for llm in (one, four)]
    logits = [llm.logits(range(3, 60)) for llm in (one, four)]
    furthest = np.abs(logits[0] - logits[1]).max() / logits[0].std()
    assert furthest < {"float32": 5e-5, "float16": 3e-3}[dtype]
    assert tokens[0] == tokens[1]
    assert one.engine.fingerprint != four.engine.fingerprint
