"""A model is split over several devices, simulated on the CPU, without a change of any token."""

import dataclasses

import jax
import pytest

from llama_jax.errors import InputError
from llama_jax.nn.sharding import Shards, choose_shards, num_params
from llama_jax.nn.transformer import param_shapes
from tests.helpers.models import SMALL
from tests.helpers.simulated_devices import run_cases

LLAMA_2 = {
    "7b": dataclasses.replace(SMALL, dim=4096, ffn_dim=11008, num_heads=32, num_kv_heads=32),
    "13b": dataclasses.replace(SMALL, dim=5120, ffn_dim=13824, num_heads=40, num_kv_heads=40),
    "70b": dataclasses.replace(SMALL, dim=8192, ffn_dim=28672, num_heads=64, num_kv_heads=8),
}


@pytest.mark.parametrize(
    ("model", "devices", "expected"),
    [
        ("7b", 1, (1, 1)),
        ("7b", 32, (32, 1)),
        ("13b", 8, (8, 1)),
        ("70b", 4, (4, 1)),
        ("70b", 16, (8, 2)),
        ("70b", 64, (8, 8)),
    ],
)
def test_heads_are_split_by_key_value_head_first(model, devices, expected):
    assert choose_shards(LLAMA_2[model], devices) == Shards(*expected)


@pytest.mark.parametrize(
    ("model", "devices", "choose"),
    [("7b", 3, "1, 2, 4, 8, 16, 32"), ("13b", 16, "1, 2, 4, 8"), ("70b", 128, "1, 2, 4, 8, 16")],
)
def test_what_does_not_divide_is_refused_with_what_does(model, devices, choose):
    with pytest.raises(InputError, match=f"over {devices} devices: .*; choose {choose}"):
        choose_shards(LLAMA_2[model], devices)


def test_a_device_holds_its_share_of_the_parameters():
    config = dataclasses.replace(LLAMA_2["70b"], vocab_size=32000, num_layers=80)
    assert num_params(config) == 68_976_648_192  # as published
    share = num_params(config, choose_shards(config, 16)) / num_params(config)
    assert 1 / 16 < share < 1.03 / 16  # keys and values are split in 8, norms are whole
    assert num_params(SMALL) == sum(leaf.size for leaf in jax.tree.leaves(param_shapes(SMALL)))


SOME = "gqa-float16 or int8_weights or holds_its_part or test_batch_and_server"


@pytest.mark.slow
def test_some_cases_on_eight_devices():
    assert " passed" in run_cases("sharded_cases", "-k", SOME)


@pytest.mark.exhaustive
@pytest.mark.long
def test_every_case_on_eight_devices(assets):
    assert " passed" in run_cases("sharded_cases", "-k", f"not ({SOME})")
