"""The programs as compiled for GPUs and TPUs: no copies, and bounds on memory and traffic.

Small shapes by default. The slow tests hold what docs/deploy.md and docs/scaling.md say of others.
"""

import dataclasses
import json
import math
import os
import subprocess

import pytest

from benchmarks.model_cost import kv_bytes, layer_params
from benchmarks.shapes import load_shape
from llama_jax.decode.chips import CHIPS
from llama_jax.decode.memory import needed_memory
from llama_jax.decode.plan import accelerator_plan
from llama_jax.nn.sharding import choose_shards
from tests.helpers import ROOT

IN_ONE_SUM = "--xla_gpu_experimental_force_split_k=1"
"""Without a card to time them on, XLA cuts the inner dimension of a GPU's products into parts, and
writes a float32 sum of each. This flag is to have it write none."""


@pytest.fixture
def compiled(aot, tmp_path):
    """Run the command; return its record of each program, by kind and slots."""

    def run(chip, *flags, xla_flags=""):
        dtype = "float16" if chip == "h100" else "bfloat16"
        command = [aot, "-m", "benchmarks.aot", f"--target={chip}", f"--dtype={dtype}"]
        done = subprocess.run(
            [*command, *flags, f"--output={tmp_path}", "--name=record"],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": xla_flags},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        programs = json.loads((tmp_path / "record.json").read_text())["programs"]
        return {(each["program"].split("(")[0], each["batch"]): each for each in programs}

    return run


def check_decode(found, config, batch, context, bound):
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * batch
    assert found["aliased_bytes"] >= cache
    assert found["large_results"] == []
    assert found["conditionals"] == 0
    assert 0.95 < found["traffic"] / found["cost"]["bytes"] <= bound


@pytest.mark.slow
@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=pytest.mark.exhaustive), "h100"])
def test_a_small_model(compiled, chip):
    config = load_shape("demo")
    programs = compiled(chip, "--shape=demo", "--context=512", "--batch=1,2")
    for batch in (1, 2):
        decode, prefill = programs["decode", batch], programs["prefill", batch]
        cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim * 512 * batch
        assert min(decode["aliased_bytes"], prefill["aliased_bytes"]) >= cache
        assert decode["conditionals"] == prefill["conditionals"] == 0
        assert prefill["temp_bytes"] < 10e6


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("chip", "xla_flags"),
    [("v5e", ""), ("v5p", ""), ("v6e", ""), ("h100", IN_ONE_SUM)],
)
def test_7b(compiled, chip, xla_flags):
    """With a context of 4,096. Eight slots of it do not fit a v5e: of these it gets four layers."""
    config, batches = load_shape("7b"), (1, 8)
    if chip == "v5e":
        few = compiled(chip, "--shape=7b", "--batch=8", "--layers=4")
        check(few, dataclasses.replace(config, num_layers=4), 8, 1.03, chip)
        batches = (1,)
    numbers = ",".join(map(str, batches))
    programs = compiled(chip, "--shape=7b", f"--batch={numbers}", xla_flags=xla_flags)
    for batch in batches:
        check(programs, config, batch, 1.03, chip)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("chip", "xla_flags"), [("v5e", ""), ("h100", IN_ONE_SUM)])
def test_int8_weights_are_widened_as_they_are_read(compiled, chip, xla_flags):
    """No step writes a weight in 16 bits; four layers of 7B."""
    flags = ("--shape=7b", "--layers=4", "--batch=1,8", "--weights=int8", "--programs=decode")
    for found in compiled(chip, *flags, xla_flags=xla_flags).values():
        assert found["large_results"] == []
        assert found["traffic"] / found["cost"]["bytes"] <= 1.05
        assert found["temp_bytes"] < 0.1e9


@pytest.mark.exhaustive
def test_a_gpus_sums_of_parts_are_two_percent(compiled):
    """Without the flag, of four layers."""
    config = dataclasses.replace(load_shape("7b"), num_layers=4)
    programs = compiled("h100", "--shape=7b", "--batch=1,8", "--layers=4")
    for batch in (1, 8):
        check(programs, config, batch, 1.05, "h100")


def check(programs, config, batch, bound, chip):
    """Hold both programs of a number of slots to their bounds, and to what --estimate says."""
    decode, prefill = programs["decode", batch], programs["prefill", batch]
    check_decode(decode, config, batch, 4096, bound)
    assert decode["temp_bytes"] < 0.1e9
    assert prefill["temp_bytes"] < 0.3e9
    # Neither the table of embeddings nor the cache of eight slots is written whole.
    whole = min(config.vocab_size * config.dim, 8 * config.dim * 4096)
    assert all(math.prod(shape) < whole for _, shape in prefill["large_results"])
    plan = accelerator_plan("gpu" if chip == "h100" else "tpu", "bfloat16")
    needed = needed_memory(config, plan, batch, 4096)
    for found in (decode, prefill):
        assert found["temp_bytes"] < needed.working
        assert found["argument_bytes"] < needed.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "batches"),
    [("v5e", "1,8"), pytest.param("h100", "8", marks=pytest.mark.exhaustive)],
)
def test_a_small_model_on_four_devices(compiled, chip, batches):
    config = dataclasses.replace(load_shape("demo"), num_layers=2)
    flags = ("--shape=demo", "--layers=2", "--context=512", "--devices=4")
    programs = compiled(chip, *flags, f"--batch={batches}")
    for (kind, batch), found in programs.items():
        check_exchange(found, config, choose_shards(config, 4), kind)
        cache = 512 * batch * kv_bytes(config, "float16", choose_shards(config, 4))
        assert found["aliased_bytes"] >= cache
        assert found["conditionals"] == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("shape", "target", "devices", "bounds", "programs"),
    [
        ("70b", "v5e:4x4", 16, (1.02, 1.02), "decode"),
        ("70b", "v6e:2x4", 8, (1.02, 1.02), "decode,prefill"),
        # Of 70B's cache a GPU reads less than it writes of scores and of values of blocks: eight
        # queries share a key.
        ("70b", "h100", 4, (1.03, 1.07), "decode,prefill"),
        ("13b", "h100", 2, (1.03, 1.04), "decode"),
        ("13b", "h100", 4, (1.04, 1.05), "decode"),
    ],
)
def test_a_large_model_on_several_devices(compiled, shape, target, devices, bounds, programs):
    """Four layers, with a context of 4,096; all layers fit, by the sum of what four take."""
    chip, whole = target.partition(":")[0], load_shape(shape)
    config, shards = dataclasses.replace(whole, num_layers=4), choose_shards(whole, devices)
    flags = [f"--shape={shape}", f"--devices={devices}", "--layers=4", "--batch=1,8"]
    flags.append(f"--programs={programs}")
    record = compiled(target, *flags, xla_flags=IN_ONE_SUM if chip == "h100" else "")
    assert len(record) == 2 * len(programs.split(","))
    for (kind, batch), found in record.items():
        check_exchange(found, config, shards, kind)
        cache = 4096 * batch * kv_bytes(config, "float16", shards)
        assert found["aliased_bytes"] >= cache
        assert found["conditionals"] == 0
        assert found["temp_bytes"] < 0.3e9
        if kind == "decode":
            assert found["large_results"] == []
            assert found["traffic"] / found["cost"]["bytes"] <= bounds[batch == 8]
        taken = found["argument_bytes"] + found["temp_bytes"]
        taken += 2 * (layer_params(whole, shards) - layer_params(config, shards))
        taken += 4096 * batch * kv_bytes(whole, "float16", shards) - cache
        assert taken <= CHIPS[chip].memory, (kind, batch)


def check_exchange(found, config, shards, kind):
    """Hold a program to four all-gathers a layer, and those of embeddings and a step's logits."""
    assert list(found["collectives"]) == ["all-gather"]
    gathered = found["collectives"]["all-gather"]
    assert gathered["count"] == 4 * config.num_layers + (2 if kind == "decode" else 1)
    assert found["collectives_outside"] == 0
    # Of activations in float32: no weight and no cache.
    rows = 8 if kind == "decode" else 256
    numbers = config.num_layers * (3 * config.dim + config.ffn_dim) + config.dim
    numbers += config.vocab_size if kind == "decode" else 0
    assert gathered["received"] <= 4 * rows * numbers * (1 - 1 / shards.devices)
