"""The programs as compiled for GPUs and TPUs: no copies, and bounds on memory and traffic.

Small shapes by default. Of 7B the slow ones say what docs/performance.md says.
"""

import dataclasses
import json
import math
import os
import subprocess

import pytest

from benchmarks.shapes import load_shape
from llama_jax.decode.memory import needed_memory
from llama_jax.decode.plan import accelerator_plan
from tests.helpers import ROOT

CHIPS = {"v5e": "bfloat16", "v5p": "bfloat16", "v6e": "bfloat16", "h100": "float16"}

IN_ONE_SUM = "--xla_gpu_experimental_force_split_k=1"
"""Without a card to time them on, XLA cuts the inner dimension of a GPU's products into parts, and
writes a float32 sum of each. This flag is to have it write none."""


@pytest.fixture
def compiled(aot, tmp_path):
    """Run the command; return its record of each program, by kind and slots."""

    def run(chip, *flags, xla_flags=""):
        command = [aot, "-m", "benchmarks.aot", f"--target={chip}", f"--dtype={CHIPS[chip]}"]
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


@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=pytest.mark.slow), "h100"])
def test_a_small_model(compiled, chip):
    config = load_shape("demo")
    programs = compiled(chip, "--shape=demo", "--context=512", "--batch=1,2")
    for batch in (1, 2):
        decode, prefill = programs["decode", batch], programs["prefill", batch]
        cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim * 512 * batch
        assert min(decode["aliased_bytes"], prefill["aliased_bytes"]) >= cache
        assert decode["conditionals"] == prefill["conditionals"] == 0
        assert prefill["temp_bytes"] < 10e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "bound", "xla_flags"),
    [
        ("v5e", 1.03, ""),
        ("v5p", 1.03, ""),
        ("v6e", 1.03, ""),
        ("h100", 1.03, IN_ONE_SUM),
        ("h100", 1.05, ""),
    ],
)
def test_7b(compiled, chip, bound, xla_flags):
    """With a context of 4,096. Eight slots of it do not fit a v5e: of these it gets four layers."""
    config, batches = load_shape("7b"), (1, 8)
    if chip == "v5e":
        few = compiled(chip, "--shape=7b", "--batch=8", "--layers=4")
        check(few, dataclasses.replace(config, num_layers=4), 8, bound, chip)
        batches = (1,)
    numbers = ",".join(map(str, batches))
    programs = compiled(chip, "--shape=7b", f"--batch={numbers}", xla_flags=xla_flags)
    for batch in batches:
        check(programs, config, batch, bound, chip)


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
