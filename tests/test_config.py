import dataclasses
import math

import jax
import pytest

from llama_jax import InputError, ModelConfig
from llama_jax.nn.transformer import param_shapes
from tests.helpers import ROOT
from tests.helpers.models import SMALL

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b-chat-fp16", 6_738_415_616),
        pytest.param("llama-2-7b", 6_738_415_616, marks=pytest.mark.slow),
        pytest.param("llama-2-13b", 13_015_864_320, marks=pytest.mark.slow),
        ("llama-2-13b-chat", 13_015_864_320),
        pytest.param("llama-2-70b", 68_976_648_192, marks=pytest.mark.slow),
        pytest.param("llama-2-70b-chat", 68_976_648_192, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(name, parameters):
    shapes = param_shapes(ModelConfig.load(CONFIGS / f"{name}.json"))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_every_preset_is_counted():
    assert len(list(CONFIGS.glob("*.json"))) == 6


def load(text, tmp_path):
    (tmp_path / "here.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ModelConfig.load(tmp_path / "here.json")


def test_json_round_trip(tmp_path):
    assert load(SMALL.to_json(), tmp_path) == SMALL


def test_whole_numbers_are_floats_in_json(tmp_path):
    assert load(SMALL.to_json().replace("10000.0", "10000"), tmp_path) == SMALL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 25}, "dim is 25, expected a multiple of 2 * num_heads = 8"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of 4"),
        ({"num_layers": 0}, "num_layers is 0, expected a positive number"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0, expected a positive number"),
        ({"norm_eps": math.nan}, "norm_eps is nan, expected a positive number"),
        ({"vocab_size": 2}, "vocab_size is 2, expected at least 3"),
        ({"dim": "64"}, "dim is '64', expected int"),
        ({"num_layers": True}, "num_layers is True, expected int"),
    ],
)
def test_out_of_range(changes, message):
    with pytest.raises(InputError) as error:
        dataclasses.replace(SMALL, **changes)
    assert message in str(error.value)


def test_one_error_names_every_problem():
    with pytest.raises(InputError) as error:
        dataclasses.replace(SMALL, dim=25, num_kv_heads=3)
    assert "dim is 25" in str(error.value)
    assert "num_kv_heads is 3" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "not JSON"),
        ("[1]", "got a list, expected a JSON object"),
        ("[" * 100_000, "not JSON"),
        (b'{"dim": "\xff"}', "not JSON"),
        ('{"dim": 4, "hidden_size": 4}', "unknown key 'hidden_size'; missing key 'ffn_dim'"),
        (
            SMALL.to_json().replace("1e-05", "9" * 400),
            "norm_eps is inf, expected a positive number",
        ),
    ],
)
def test_bad_json(text, message, tmp_path):
    with pytest.raises(InputError) as error:
        load(text, tmp_path)
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot read it \(No such file"):
        ModelConfig.load(tmp_path / "none.json")
