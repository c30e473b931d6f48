"""What the programs of a model that is split over four devices exchange: gathers, and no more.

Of simulated devices: XLA cuts the CPU into four, in a process of its own.
"""

import dataclasses

import pytest

from tests.helpers.models import SMALL
from tests.helpers.simulated_devices import run_code

CONFIG = dataclasses.replace(
    SMALL, vocab_size=512, dim=128, ffn_dim=192, num_heads=8, max_seq_len=512
)
"""Two key/value heads: each is on two devices, which share its query heads."""

COMPILE = """
import dataclasses, json, sys
import jax
from benchmarks.aot import compile_program
from llama_jax.config import ModelConfig
from llama_jax.decode.needs import ALL_NEEDS, Needs
from llama_jax.decode.plan import accelerator_plan, choose_plan
from llama_jax.decode.model_programs import Decode, Prefill
from llama_jax.nn.sharding import choose_shards, make_mesh
config, platform, batches = map(json.loads, sys.argv[1:])
config = ModelConfig(**config)
dtype = "float32" if platform == "cpu" else "float16"
plan = choose_plan(config, dtype) if platform == "cpu" else accelerator_plan(platform, dtype)
plan = plan._replace(varied_steps=False)  # exchanges are counted by the turns of a loop
mesh = make_mesh(choose_shards(config, 4), jax.devices())
found = []
for batch in batches:
    needs = ALL_NEEDS if batch == 1 else Needs()
    for program in (Decode(batch, 4, 256, needs), Prefill(64, 256)):
        each = compile_program(program, config, plan, batch, 256, mesh)
        found.append((type(program).__name__, batch, dataclasses.asdict(each)))
print(json.dumps(found))
"""


def compile_programs(config, platform, batches):
    """Compile both programs by the plan of a platform; return kind, slots and record of each."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k != "eos_tokens"}
    return run_code(COMPILE, fields, platform, batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    "platform", ["cpu", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("gpu", "tpu"))]
)
def test_each_layer_gathers_four_times_and_nothing_else_is_exchanged(platform):
    layers = 4 * CONFIG.num_layers
    for kind, batch, found in compile_programs(CONFIG, platform, [1, 8]):
        outside = {"Decode": 2, "Prefill": 1}[kind]  # the embeddings, and a step's logits
        assert list(found["collectives"]) == ["all-gather"], (kind, batch)
        gathered = found["collectives"]["all-gather"]
        assert gathered["count"] == layers + outside
        assert found["collectives_outside"] == 0
        # Activations in float32, of whole `decode_rows`: neither a weight nor a cache.
        rows = 8 if kind == "Decode" else 64
        numbers = CONFIG.num_layers * (3 * CONFIG.dim + CONFIG.ffn_dim) + CONFIG.dim
        numbers += CONFIG.vocab_size if kind == "Decode" else 0
        assert gathered["received"] <= 4 * rows * numbers * 3 / 4
        # A device's cache: one head of each layer's keys and values.
        item = 4 if platform == "cpu" else 2
        cache = 2 * CONFIG.num_layers * CONFIG.head_dim * 256 * batch * item
        assert found["aliased_bytes"] >= cache
        assert found["argument_bytes"] < 2 * (found["cost"]["bytes"] + cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "decoding", "reading"),
    [({"vocab_size": 511}, 1, 1), ({"tie_embeddings": True}, 0, 0)],
)
def test_an_output_layer_that_is_not_split_needs_no_gather(change, decoding, reading):
    config = dataclasses.replace(CONFIG, num_layers=1, **change)
    for kind, _, found in compile_programs(config, "cpu", [8]):
        assert list(found["collectives"]) == ["all-gather"]
        outside = {"Decode": decoding, "Prefill": reading}[kind]
        assert found["collectives"]["all-gather"]["count"] == 4 + outside
