"""Conversion from Hugging Face's layout, the command line, and what both readers share."""

import dataclasses
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from convert import huggingface, names
from convert.__main__ import main
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.nn.transformer import param_shapes
from llama_jax.weights.checkpoint import load_checkpoint, open_checkpoint
from tests.helpers import ROOT
from tests.helpers.sources import (
    GQA,
    TIED,
    assert_same,
    flat,
    hf_name,
    meta_name,
    random_weights,
    read_all,
    read_hf,
    write_hf,
)


def test_names_cover_exactly_the_models_parameters():
    assert {row.ours for row in names.names(2)} == flat(param_shapes(GQA)).keys()
    for row in names.names(2):
        assert row.huggingface == hf_name(row.ours)
        assert row.meta == meta_name(row.ours)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_hf_tensors_go_over_untouched(tmp_path, dtype, shards):
    weights = random_weights(GQA, dtype)
    config, got = read_hf(write_hf(tmp_path / "hf", weights, shards))
    assert config == GQA
    assert_same(got, weights)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 50000.0},
        {"rope_theta": 50000},
        {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}},
        {"rope_theta": 50000.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 50000.0, "rope_parameters": {"rope_theta": 50000.0}},
    ],
)
def test_rope_theta_is_found_wherever_it_is_written(tmp_path, weights, rope):
    config, _ = read_hf(write_hf(tmp_path / "hf", weights, **rope))
    assert config.rope_theta == 50000.0


def test_absent_keys_have_transformers_defaults(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"}')
    assert huggingface.read_config(path) == ModelConfig(
        vocab_size=32000,
        dim=4096,
        ffn_dim=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        norm_eps=1e-6,
        rope_theta=10000.0,
        max_seq_len=2048,
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "mistral"}, "is a mistral model, expected a Llama 2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is .*dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_factor is '2', expected float"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_factor is 0.0, expected a pos"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*factor"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters is .*llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is .*0.5"),
        ({"rope_parameters": "yarn"}, "rope_parameters is yarn"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta 10000.0, .*1000"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"head_dim": 16}, r"head_dim is 16, expected .* 64 / 8 = 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantized \(gptq\), expected 16"),
        ({"bos_token_id": 128000}, "bos_token_id is 128000, expected 1"),
        (
            {"eos_token_id": [2, 700]},
            r"eos_tokens is \[2, 700\], expected .* below vocab_size = 300",
        ),
        ({"eos_token_id": []}, r"eos_tokens is \[\], expected one or more"),
        ({"eos_token_id": "</s>"}, r"eos_tokens is \['</s>'\], expected one or more"),
        ({"hidden_size": "64"}, "dim is '64', expected int"),
    ],
)
def test_config_settings_the_model_cannot_honour_are_refused(tmp_path, weights, setting, message):
    folder = write_hf(tmp_path / "hf", weights, **setting)
    with pytest.raises(InputError, match=message):
        huggingface.open_source(folder)


def test_all_config_problems_come_in_one_error(tmp_path, weights):
    folder = write_hf(tmp_path / "hf", weights, mlp_bias=True, hidden_act="gelu", hidden_size=65)
    with pytest.raises(InputError, match=r"hidden_act is .*mlp_bias is ") as caught:
        huggingface.open_source(folder)
    assert "dim is 65" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ([2], None, (2,)),
        ([2, 261], None, (2, 261)),
        (2, [2, 261], (2, 261)),
        ([2, 261], 2, (2,)),  # transformers generates by generation_config.json
        (None, {}, (2,)),
    ],
)
def test_end_tokens_are_those_that_transformers_stops_at(
    tmp_path, weights, config, generation, expected
):
    folder = write_hf(tmp_path / "hf", weights, eos_token_id=config, head_dim=8)
    if generation is not None:
        values = generation if generation == {} else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(values))
    assert read_hf(folder)[0] == dataclasses.replace(GQA, eos_tokens=expected)


def test_end_tokens_given_take_the_place_of_the_sources(tmp_path, weights, capsys):
    source = str(write_hf(tmp_path / "hf", weights, eos_token_id=2))
    for given, expected in (("5,7", (5, 7)), ("2", (2,))):
        assert main(["hf", source, str(tmp_path / given), f"--eos_tokens={given}"]) == 0
        assert open_checkpoint(tmp_path / given)[1].eos_tokens == expected
        warned = "answers end at [5, 7], without Llama 2's 2" in capsys.readouterr().err
        assert warned == (2 not in expected)
    with pytest.raises(SystemExit, match="2"):
        main(["hf", source, str(tmp_path / "x"), "--eos_tokens=2,</s>"])
    assert "'2,</s>' is not token ids such as 2,32000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rope", "factor", "context"),
    [
        ({"type": "linear", "factor": 1.0}, 1.0, 64),
        ({"type": "linear", "factor": 4}, 4.0, 256),
        ({"rope_type": "linear", "factor": 2.5}, 2.5, 160),
        (
            {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 16},
            *(4.0, 64),
        ),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_linear_scaling_divides_positions_and_extends_the_context(
    tmp_path, weights, key, rope, factor, context
):
    config, _ = read_hf(write_hf(tmp_path / "hf", weights, **{key: rope}))
    assert config == dataclasses.replace(GQA, rope_factor=factor, max_seq_len=context)
    folder = write_hf(tmp_path / "named", weights, **{key: rope}, max_sequence_length=100)
    assert read_hf(folder)[0].max_seq_len == 100  # FastChat's key
    assert huggingface.open_source(folder, 48).config.max_seq_len == 48


def test_tied_embeddings_have_no_lm_head(tmp_path):
    weights = random_weights(TIED)
    copy = weights | {"lm_head": weights["embed"]}
    for name, given in (("without", weights), ("with", copy)):
        folder = write_hf(tmp_path / name, given, tie_word_embeddings=True)
        config, got = read_hf(folder)
        assert config == TIED
        assert_same(got, weights)


def test_tied_lm_head_must_equal_the_embedding(tmp_path, weights):
    folder = write_hf(tmp_path / "hf", weights, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        read_hf(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_old_rotary_buffers_are_ignored(tmp_path, weights, shards):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert_same(read_hf(write_hf(tmp_path / "hf", weights | extra, shards))[1], weights)


def test_every_wrong_tensor_is_in_one_error(tmp_path, weights):
    del weights["layer_1/attention/q"]
    weights["layer_0/feed_forward/up"] = np.zeros((3, 4), np.float32)
    weights["layer_0/ffn_norm"] = np.zeros(32, np.int32)
    weights["model.extra.bias"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as caught:
        read_hf(write_hf(tmp_path / "hf", weights))
    message = str(caught.value)
    assert "missing: model.layers.1.self_attn.q_proj.weight;" in message
    assert "unexpected: model.extra.bias;" in message
    assert "model.layers.0.mlp.up_proj.weight is [3, 4], expected [176, 64]" in message
    assert "model.layers.0.post_attention_layernorm.weight is I32" in message


def test_long_lists_are_abbreviated(tmp_path, weights):
    with pytest.raises(InputError, match="and 12 more") as caught:
        read_hf(write_hf(tmp_path / "hf", {"embed": weights["embed"]}))
    assert str(caught.value).count("weight") == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no weight_map"),
        ("[]", "got a list, expected a JSON object"),
        ("<html>", "not JSON"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"names '\.\./b\.safetensors'"),
        ('{"weight_map": {"a": 1}}', "names 1, expected files"),
    ],
)
def test_corrupted_index_is_named(tmp_path, weights, text, message):
    folder = write_hf(tmp_path / "hf", weights, 2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=rf"model\.safetensors\.index\.json.*{message}"):
        huggingface.open_source(folder)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion_is_exact_where_it_can_be(tmp_path, stored, dtype):
    folder = write_hf(tmp_path / "hf", random_weights(GQA, stored))
    _, got = read_all(huggingface.open_source(folder), dtype)
    assert_same(got, random_weights(GQA, np.dtype(dtype)))


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_overflow_names_the_tensor_and_the_value(tmp_path, weights, stored):
    weights = {path: array.astype(stored) for path, array in weights.items()}
    weights["layer_1/attention/v"][3, 4] = -70144
    opened = huggingface.open_source(write_hf(tmp_path / "hf", weights))
    with pytest.raises(InputError, match=r"layers\.1.*v_proj.*float16: .* 70,144, .*65,504"):
        read_all(opened, "float16")
    read_all(opened, "bfloat16")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    weights = random_weights(GQA, dtype)
    weights["final_norm"][[3, 5]] = value
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN or infinity in 2 of 64"):
        read_hf(write_hf(tmp_path / "hf", weights))


def test_mixed_dtypes_need_a_choice(tmp_path, weights):
    weights["final_norm"] = weights["final_norm"].astype(np.float16)
    opened = huggingface.open_source(write_hf(tmp_path / "hf", weights))
    with pytest.raises(InputError, match=r"20 float32, 1 float16.*--dtype"):
        read_all(opened)
    _, got = read_all(opened, "float32")
    assert {array.dtype for array in got.values()} == {np.dtype(np.float32)}


def test_cli_converts_and_says_what_it_wrote(tmp_path, hf, tokenizer):
    tokenizer.rename(hf / "tokenizer.model")
    done = subprocess.run(
        [sys.executable, "-m", "convert", "hf", hf, tmp_path / "out", "--dtype=float16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count = sum(array.size for array in random_weights(GQA).values())
    (line,) = done.stdout.splitlines()  # and none of rounding: all is exact in float16
    assert line.startswith(f"wrote {count:,} parameters, float16, ")
    assert f"python run.py --checkpoint={tmp_path / 'out'} " in line
    assert "warning" not in done.stderr
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.dtype == "float16"
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.read_bytes() == (hf / "tokenizer.model").read_bytes()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        main(["hf", str(tmp_path / "none"), str(tmp_path / "out"), "--debug"])


def test_destination_is_checked_before_the_work(tmp_path, hf, capsys, monkeypatch):
    monkeypatch.setattr(huggingface, "open_source", None)
    for command in ("hf", "export-hf"):
        assert main([command, str(hf), str(hf)]) == 2
        assert "already exists; remove it or name another" in capsys.readouterr().err
    assert main(["hf", str(hf), str(hf / "config.json" / "out")]) == 2
    assert "is no folder that you can write to" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["hf", str(hf), str(tmp_path / "out")]) == 2
    assert f"{tmp_path} is no folder that you can write to" in capsys.readouterr().err


def test_nothing_is_left_after_an_error(tmp_path, weights, capsys):
    weights["final_norm"][0] = np.nan
    folder = write_hf(tmp_path / "hf", weights)
    assert main(["hf", str(folder), str(tmp_path / "out")]) == 2
    assert "model.norm.weight holds NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_tokenizer_must_fit_the_embedding(tmp_path, hf, tokenizer, capsys):
    tokenizer.rename(hf / "tokenizer.model")
    config = dataclasses.replace(GQA, vocab_size=400)
    other = write_hf(tmp_path / "other", random_weights(config), vocab_size=400)
    (hf / "tokenizer.model").rename(other / "tokenizer.model")
    assert main(["hf", str(other), str(tmp_path / "out")]) == 2
    assert "has 300 pieces, the model's vocab_size is 400" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_broken_link_is_named(hf, tmp_path, tokenizer, capsys, name):
    """As a hub cache has them once its blobs are gone."""
    tokenizer.rename(hf / "tokenizer.model")
    (hf / name).unlink()
    (hf / name).symlink_to(tmp_path / "gone")
    assert main(["hf", str(hf), str(tmp_path / "out")]) == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
