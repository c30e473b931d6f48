"""What the programs of several replicas exchange: gathers within each, and nothing between them.

Of simulated devices: XLA cuts the CPU into four, in a process of its own.
"""

import json
import re

import numpy as np
import pytest

from tests.helpers.simulated_devices import run_code

LAYERS, SLOTS_EACH, CAPACITY, HEAD_DIM = 2, 3, 256, 16

COMPILE = """
import dataclasses, json, sys
import jax
from llama_jax.decode.executor import Executor
from llama_jax.decode.model_programs import Decode, FirstToken, Prefill, Score
from llama_jax.decode.needs import Needs
from llama_jax.decode.plan import accelerator_plan, choose_plan
from llama_jax.decode.state_programs import Admit, ClearSlot, CopySlot, Release
from llama_jax.nn.sharding import choose_shards, make_mesh
from tests.helpers.models import SMALL, random_params
platform, layout = map(json.loads, sys.argv[1:])
config = dataclasses.replace(
    SMALL, vocab_size=512, dim=128, ffn_dim=192, num_heads=8, max_seq_len=256
)
plan = choose_plan(config, "float32")
if platform != "cpu":
    plan = accelerator_plan(platform, "float16")
replicas, devices, slots = layout
mesh = make_mesh(choose_shards(config, devices), jax.devices()[: replicas * devices])
sizes = {"batch": slots, "context": 256}
ex = Executor(config, random_params(config), "float32", **sizes, plan=plan, mesh=mesh)
for program in (Admit(), Release(), CopySlot(), ClearSlot()):
    ex.compile(program)
for program in (Prefill(64, 256), Score(64), FirstToken(Needs(logprobs=True))):
    ex.compile(program)
for count in ex.sizes.decode_counts:
    ex.compile(Decode(count, plan.decode_steps, 256, Needs()))
print(json.dumps({name: ex.programs[name].as_text() for name in ex.compiled.names}))
"""


def compile_programs(platform, replicas, devices):
    """Return the optimised HLO of every program by the plan of a platform."""
    return run_code(COMPILE, platform, [replicas, devices, replicas * SLOTS_EACH])


def exchanges(text):
    """Yield each operation between devices, and the groups of devices that it is between."""
    operations = r"(all-\w[\w-]*|collective-\w[\w-]*|ragged-\S+|reduce-scatter|send|recv)\("
    for line in text.splitlines():
        if found := re.search(rf"= \S+ {operations}", line):
            groups = re.search(r"replica_groups=(\S+?)(, \w|$)", line)
            yield found[1], parse_groups(groups[1]) if groups else None


def parse_groups(text):
    """Return the groups that HLO writes as {{0,1},{2,3}} or as [2,2]<=[4]."""
    if text.startswith("{"):
        return json.loads(text.translate(str.maketrans("{}", "[]")))
    shape, source = re.fullmatch(r"\[([\d,]+)\]<=\[(\d+)\]", text).groups()
    return np.arange(int(source)).reshape([int(n) for n in shape.split(",")]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "replicas", "devices"),
    [("cpu", 2, 2), ("gpu", 4, 1)],
)
def test_nothing_is_exchanged_between_replicas_and_no_cache_is_copied(platform, replicas, devices):
    programs = compile_programs(platform, replicas, devices)
    gathers = 4 * LAYERS if devices > 1 else 0
    cache = rf"= \w+\[{SLOTS_EACH},{2 // devices},{CAPACITY},{HEAD_DIM}\]\S*"
    for name, text in programs.items():
        found = list(exchanges(text))
        assert {operation for operation, _ in found} <= {"all-gather"}, name
        for _, groups in found:
            assert all(len({device // devices for device in each}) == 1 for each in groups), name
        if name.startswith(("decode", "prefill")):
            assert len(found) >= gathers, name
        else:
            assert len(found) <= 1, name  # of logits
        is_of_state = not name.startswith("score")
        assert (re.search(rf"{cache} parameter", text) is not None) == is_of_state, name
        assert not re.search(rf"{cache} (copy|copy-start|select)\(", text), name
        if name.startswith(("decode", "prefill", "first_token", "score")):
            assert " while(" in text, name  # of steps, or of one turn, which other replicas skip
