"""Conversion from Meta's layout, which needs PyTorch."""

import dataclasses
import sys

import ml_dtypes
import numpy as np
import pytest

from convert import meta
from convert.__main__ import main
from llama_jax.errors import InputError
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers.sources import (
    GQA,
    MHA,
    assert_same,
    random_weights,
    read_all,
)

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")

from tests.helpers.meta_sources import meta_shards, write_meta  # noqa: E402 (needs torch)


def read_meta(folder):
    return read_all(meta.open_source(folder, 64))


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "dtype", [pytest.param(np.float32, marks=pytest.mark.slow), ml_dtypes.bfloat16]
)
def test_meta_shards_give_the_same_tree(tmp_path, config, shards, dtype):
    weights = random_weights(config, dtype)
    ranks = meta_shards(weights, config, shards)
    folder = write_meta(tmp_path / "meta", ranks, n_kv_heads=config.num_kv_heads)
    got_config, got = read_meta(folder)
    assert got_config == config
    assert_same(got, weights)


def test_non_contiguous_tensors_are_read_right(tmp_path, weights):
    (rank,) = meta_shards(weights, GQA, 1)
    rank["output.weight"] = rank["output.weight"].T.contiguous().T
    assert_same(read_meta(write_meta(tmp_path / "meta", [rank]))[1], weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "holds a list"),
        ({"model": {"norm.weight": torch.ones(3)}}, "'model' is no dense tensor"),
        ({3: torch.ones(3)}, "3 is no dense tensor"),
    ],
)
def test_a_pth_of_something_else_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=rf"consolidated\.00\.pth.*{message}"):
        read_meta(write_meta(tmp_path / "meta", [content]))


def test_ffn_multiplier_and_explicit_vocabulary(tmp_path):
    config = dataclasses.replace(GQA, ffn_dim=224)  # int(1.3 * 170) = 221, rounded up
    ranks = meta_shards(random_weights(config), config, 1)
    folder = write_meta(tmp_path / "meta", ranks, ffn_dim_multiplier=1.3, vocab_size=300)
    assert read_meta(folder)[0] == config


def test_absent_kv_heads_mean_as_many_as_heads(tmp_path):
    ranks = meta_shards(random_weights(MHA), MHA, 1)
    assert read_meta(write_meta(tmp_path / "meta", ranks, n_kv_heads=None))[0] == MHA


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_scaled_rope": True}, "use_scaled_rope is True, expected false"),
        ({"moe": {"num_experts": 8}, "lora": 1}, "unknown key 'lora'; unknown key 'moe'"),
        ({"dim": None, "n_layers": "2"}, "dim is missing, .*n_layers is '2'"),
        ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier is -1"),
        ({"multiple_of": 256}, r"w1\.weight has 176 outputs .* make 256"),
        ({"vocab_size": 400}, r"tok_embeddings\.weight is \[300, 64\], expected \[400, 64\]"),
        ({"n_heads": 3}, r"params\.json: model config: dim is 64"),
        ({"norm_eps": "tiny"}, "norm_eps is 'tiny', expected float"),
    ],
)
def test_params_the_model_cannot_honour_are_refused(tmp_path, weights, setting, message):
    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 1), **setting)
    with pytest.raises(InputError, match=message):
        read_meta(folder)


@pytest.mark.parametrize(
    ("shards", "gone", "message"),
    [
        (4, 0, r"missing consolidated\.00\.pth"),
        (4, 2, r"missing consolidated\.02\.pth"),
        (2, 0, r"missing consolidated\.00\.pth"),
        (4, 3, r"has 132 outputs in all shards.*make 176; a shard is missing"),
    ],
)
def test_missing_shard_is_noticed(tmp_path, weights, shards, gone, message):
    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, shards))
    (folder / f"consolidated.{gone:02}.pth").unlink()
    with pytest.raises(InputError, match=message):
        read_meta(folder)


def test_unexpected_shard_name_is_refused(tmp_path, weights):
    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 1))
    (folder / "consolidated.final.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"unexpected consolidated\.final\.pth"):
        read_meta(folder)


def test_shards_must_hold_the_same_names(tmp_path, weights):
    ranks = meta_shards(weights, GQA, 2)
    ranks[1]["surplus"] = ranks[1].pop("norm.weight")
    with pytest.raises(
        InputError, match=r"01\.pth lacks norm\.weight; .*01\.pth alone has surplus; download"
    ):
        read_meta(write_meta(tmp_path / "meta", ranks))


def test_replicated_norms_must_be_equal(tmp_path, weights):
    ranks = meta_shards(weights, GQA, 2)
    ranks[1]["layers.1.ffn_norm.weight"][0] += 1
    with pytest.raises(InputError, match=r"layers\.1\.ffn_norm\.weight of consolidated\.01\.pth"):
        read_meta(write_meta(tmp_path / "meta", ranks))


def test_shards_must_have_the_same_shapes(tmp_path, weights):
    ranks = meta_shards(weights, GQA, 2)
    ranks[1]["output.weight"] = ranks[1]["output.weight"][:100]
    with pytest.raises(InputError, match=r"output\.weight is \[150, 64\] .*\[100, 64\]"):
        read_meta(write_meta(tmp_path / "meta", ranks))


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"])
def test_a_tensor_that_sizes_come_from_must_be_there(tmp_path, weights, name):
    (rank,) = meta_shards(weights, GQA, 1)
    del rank[name]
    with pytest.raises(InputError, match=f"{name} is missing"):
        read_meta(write_meta(tmp_path / "meta", [rank]))


def test_without_pytorch_the_extra_is_named(tmp_path, weights, monkeypatch):
    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 1))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs PyTorch.*\[convert\]"):
        read_meta(folder)


@pytest.mark.parametrize(
    ("layout", "looked_for"),
    [
        ("hf", "no config.json and no model*.safetensors or pytorch_model*.bin;"),
        ("meta", "no params.json and no consolidated.*.pth;"),
    ],
)
def test_source_folder_is_checked(tmp_path, capsys, layout, looked_for):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, expected in (
        ("none", "does not exist"),
        ("file", "is a file"),
        ("empty", f"has {looked_for}"),
    ):
        assert main([layout, str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert f"{tmp_path / name} {expected}" in capsys.readouterr().err


def test_assumed_context_and_missing_tokenizer_are_reported(tmp_path, weights, capsys):
    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 1))
    assert main(["meta", str(folder), str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    assert "assuming --max_seq_len=4096" in said.err
    assert "warning: no tokenizer.model or tokenizer.json in" in said.err
    assert "token ids only" in said.err
    assert "run.py" not in said.out
    assert load_checkpoint(tmp_path / "a").config.max_seq_len == 4096
    assert load_checkpoint(tmp_path / "a").tokenizer is None

    assert main(["meta", str(folder), str(tmp_path / "b"), "--max_seq_len=64"]) == 0
    assert "assuming" not in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "b").config.max_seq_len == 64
    with pytest.raises(SystemExit, match="2"):
        main(["meta", str(folder), str(tmp_path / "c"), "--max_seq_len=0"])


def test_tokenizer_beside_the_folder_is_found(tmp_path, weights, tokenizer, capsys):
    """Meta's download script keeps one tokenizer.model above the models' folders."""
    folder = write_meta(tmp_path / "llama-2-7b", meta_shards(weights, GQA, 1))
    assert main(["meta", str(folder), str(tmp_path / "out"), "--max_seq_len=64"]) == 0
    assert f"tokenizer.model is taken from {tmp_path}" in capsys.readouterr().err
    stored = load_checkpoint(tmp_path / "out").tokenizer
    assert stored is not None
    assert stored.read_bytes() == tokenizer.read_bytes()
