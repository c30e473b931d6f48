"""LoRA adapters in PEFT's format, merged into their base model."""

import json
import pathlib
import re

import numpy as np
import pytest

from convert.__main__ import main
from llama_jax import Llama
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers.adapters import DOWN, Q, pair, write_adapter
from tests.helpers.sources import as_torch, flat, write_hf


def convert(source, out, adapter, *options) -> int:
    return main(["hf", str(source), str(out), f"--adapter={adapter}", "--tokenizer=none", *options])


def stored(out: pathlib.Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flat(load_checkpoint(out).params).items()}


def manifest(out: pathlib.Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def delta(tensors, module: str, scale: float) -> np.ndarray:
    """Return scale * B @ A in float64."""
    a, b = (
        next(t for name, t in tensors.items() if f"{module}.lora_{side}" in name).astype(np.float64)
        for side in "AB"
    )
    return scale * b @ a


@pytest.mark.parametrize(
    ("settings", "ranks", "scales"),
    [
        ({}, (4, 4), (6 / 4, 6 / 4)),
        ({"use_rslora": True}, (4, 4), (6 / 2, 6 / 2)),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}},
            (2, 4),
            (3, 5 / 4),
        ),
        ({"fan_in_fan_out": True}, (4, 4), (6 / 4, 6 / 4)),  # PEFT ignores it in linear layers
    ],
    ids=["plain", "rslora", "patterns", "fan_in_fan_out"],
)
def test_a_merged_weight_is_w_plus_scale_b_a(hf, tmp_path, weights, settings, ranks, scales):
    tensors = pair(Q, ranks[0], weights) | pair(DOWN, ranks[1], weights)
    folder = write_adapter(tmp_path / "lora", tensors, **settings)
    assert convert(hf, tmp_path / "out", folder) == 0
    got, paths = stored(tmp_path / "out"), ["layer_0/attention/q", "layer_1/feed_forward/down"]
    for path, module, scale in zip(paths, (Q, DOWN), scales, strict=True):
        expected = weights[path] + delta(tensors, module, scale)
        np.testing.assert_allclose(got[path], expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected - weights[path]).max() > 1  # the tolerance does not hide the merge
    for path in weights.keys() - {*paths}:
        assert got[path].tobytes() == weights[path].tobytes(), path


def test_the_sum_is_in_float32_and_then_rounded_once(tmp_path, weights):
    source = write_hf(tmp_path / "hf", {p: w.astype(np.float16) for p, w in weights.items()})
    tensors = pair(Q, 4, weights, np.float16)
    folder = write_adapter(tmp_path / "lora", tensors)
    assert convert(source, tmp_path / "half", folder) == 0
    assert convert(source, tmp_path / "single", folder, "--dtype=float32") == 0
    half, single = stored(tmp_path / "half"), stored(tmp_path / "single")
    path = "layer_0/attention/q"
    np.testing.assert_allclose(
        single[path], weights[path] + delta(tensors, Q, 1.5), rtol=1e-5, atol=1e-5
    )
    assert half[path].tobytes() == single[path].astype(np.float16).tobytes()
    rows = manifest(tmp_path / "half")["tensors"]
    assert rows[path]["rounding"]["rounded"] > 1000
    assert "rounding" not in rows["layer_1/attention/q"]


def test_the_manifest_names_the_adapter_and_its_tensors(hf, tmp_path, weights):
    folder = write_adapter(tmp_path / "lora", pair(Q, 4, weights))
    assert convert(hf, tmp_path / "out", folder) == 0
    values = manifest(tmp_path / "out")
    assert values["origin"]["adapter"]["folder"] == "lora"
    assert len(values["origin"]["adapter"]["config_sha256"]) == 64
    base, a, b = values["tensors"]["layer_0/attention/q"]["sources"]
    assert (base["file"], base["name"]) == ("model.safetensors", f"{Q}.weight")
    assert (a["file"], b["file"]) == ("adapter_model.safetensors",) * 2
    assert (a["shape"], b["shape"]) == ([4, 64], [64, 4])
    assert len({base["sha256"], a["sha256"], b["sha256"]}) == 3


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_whole_tensors_replace_those_of_the_base(tmp_path, weights, infix):
    source = write_hf(tmp_path / "hf", {p: w.astype(np.float16) for p, w in weights.items()})
    rng = np.random.default_rng(0)
    norm, head = (
        rng.normal(size=64).astype(np.float32),
        rng.normal(size=(300, 64)).astype(np.float32),
    )
    whole = {
        f"base_model.model.model.norm{infix}.weight": norm,
        f"base_model.model.lm_head{infix}.weight": head,
    }
    folder = write_adapter(
        tmp_path / "lora", pair(Q, 4, weights) | whole, modules_to_save=["norm", "lm_head"]
    )
    assert convert(source, tmp_path / "out", folder) == 0
    got = stored(tmp_path / "out")
    assert got["final_norm"].tobytes() == norm.astype(np.float16).tobytes()
    assert got["lm_head"].tobytes() == head.astype(np.float16).tobytes()
    [part] = manifest(tmp_path / "out")["tensors"]["lm_head"]["sources"]
    assert part["file"] == "adapter_model.safetensors"


def test_both_embeddings_of_a_new_size_change_the_vocabulary(hf, tmp_path, weights):
    rng = np.random.default_rng(0)
    embed, head = rng.normal(size=(2, 302, 64)).astype(np.float32)
    whole = {
        "base_model.model.model.embed_tokens.weight": embed,
        "base_model.model.lm_head.weight": head,
    }
    folder = write_adapter(tmp_path / "lora", pair(Q, 4, weights) | whole)
    assert convert(hf, tmp_path / "out", folder) == 0
    assert load_checkpoint(tmp_path / "out").config.vocab_size == 302
    assert stored(tmp_path / "out")["embed"].tobytes() == embed.tobytes()


def test_an_adapters_own_tokenizer_comes_first(hf, tmp_path, weights, tokenizer, capsys):
    (hf / "tokenizer.model").write_bytes(b"not read")
    folder = write_adapter(tmp_path / "lora", pair(Q, 4, weights))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (folder / "added_tokens.json").write_text('{"<pad>": 300}')
    assert main(["hf", str(hf), str(tmp_path / "out"), f"--adapter={folder}"]) == 0
    assert "the added token '<pad>' (300) has no embedding" in capsys.readouterr().err
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "is an adapter of type 'IA3', expected 'LORA'"),
        ({"peft_type": "PROMPT_TUNING"}, "of type 'PROMPT_TUNING'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices is \[5\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"a_later_invention": 1}, "a_later_invention is 1"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern is .*, expected regular expressions"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused_by_name(
    hf, tmp_path, weights, capsys, settings, message
):
    folder = write_adapter(tmp_path / "lora", pair(Q, 4, weights), **settings)
    assert convert(hf, tmp_path / "out", folder) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, w: pair(Q, 8, w), r"q_proj is \[64, 64\] and r is 4, but lora_A is \[8, 64\]"),
        (lambda t, w: {n: a.T.copy() for n, a in t.items()}, r"lora_A is \[64, 4\] and lora_B \[4"),
        (lambda t, w: {n: a for n, a in t.items() if "_A" in n}, "has lora_A alone"),
        (
            lambda t, w: {n.replace("0.self", "7.self"): a for n, a in t.items()},
            "layers.7.*belongs",
        ),
        (
            lambda t, w: {n.replace("lora_", "lora_embedding_"): a for n, a in t.items()},
            "lora_embed",
        ),
        (lambda t, w: pair(Q, 4, w, adapter=".one") | pair(Q, 4, w, adapter=".two"), "one, two"),
        (
            lambda t, w: {n: a.astype(np.int32) for n, a in t.items()},
            "lora_A.weight is I32, expect",
        ),
        (
            lambda t, w: t | {"base_model.model.lm_head.weight": np.zeros((302, 64), np.float32)},
            r"the vocabularies differ \(model.embed_tokens.weight 300, lm_head.weight 302\)",
        ),
        (
            lambda t, w: t | {"base_model.model.model.norm.weight": np.zeros(32, np.float32)},
            r"norm.weight is \[32\] float32, expected \[64\]",
        ),
        (lambda t, w: {}, "holds no tensors"),
    ],
    ids=[
        *("rank", "transposed", "half", "layer", "embedding", "several", "dtype"),
        *("vocabulary", "norm", "empty"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    hf, tmp_path, weights, capsys, change, message
):
    folder = write_adapter(tmp_path / "lora", change(pair(Q, 4, weights), weights))
    assert convert(hf, tmp_path / "out", folder) == 2
    assert_one_line(capsys, message)


def test_an_adapter_on_tied_embeddings_is_refused(tmp_path, weights, capsys):
    tied = {path: w for path, w in weights.items() if path != "lm_head"}
    source = write_hf(tmp_path / "hf", tied, tie_word_embeddings=True)
    whole = {"base_model.model.model.embed_tokens.weight": weights["embed"]}
    folder = write_adapter(tmp_path / "lora", whole)
    assert convert(source, tmp_path / "out", folder) == 2
    assert_one_line(capsys, "changes model.embed_tokens.weight, which is the output layer too")


def test_a_folder_without_an_adapter_says_what_it_lacks(hf, tmp_path, weights, capsys):
    assert convert(hf, tmp_path / "out", tmp_path) == 2
    assert_one_line(capsys, "has no adapter_config.json, expected a folder that PEFT saved")
    write_adapter(tmp_path / "one", pair(Q, 4, weights))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "adapter_config.json").write_text("{}")
    assert convert(hf, tmp_path / "out", tmp_path) == 2
    assert_one_line(capsys, r"several adapters \(one, two\): name one")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    assert convert(hf, tmp_path / "out", tmp_path / "one") == 2
    assert_one_line(capsys, "has no adapter_model.safetensors or adapter_model.bin")


def assert_one_line(capsys, message: str):
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


@pytest.mark.parity
def test_a_bin_file_is_read_too(hf, tmp_path, weights):
    import torch

    tensors = pair(Q, 4, weights)
    folder = write_adapter(tmp_path / "lora", tensors)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({n: as_torch(a) for n, a in tensors.items()}, folder / "adapter_model.bin")
    assert convert(hf, tmp_path / "out", folder) == 0
    got = stored(tmp_path / "out")["layer_0/attention/q"]
    expected = weights["layer_0/attention/q"] + delta(tensors, Q, 1.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


PEFT_CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        "alpha_pattern": {"down_proj": 3, r"model\.layers\.0\.self_attn\.q_proj": 32},
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of peft and what it imports
@pytest.mark.parametrize("case", PEFT_CASES)
def test_the_logits_are_those_of_pefts_merged_model(tmp_path, weights, case):
    import peft
    import torch
    from transformers import LlamaForCausalLM

    source = write_hf(tmp_path / "hf", {path: array / 4 for path, array in weights.items()})
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        init_lora_weights=False,  # random: B is not zero
        **PEFT_CASES[case],
    )
    base = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager")
    theirs = peft.get_peft_model(base, config)
    if "modules_to_save" in PEFT_CASES[case]:
        with torch.no_grad():
            theirs.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-0.5)
            theirs.base_model.model.model.norm.modules_to_save["default"].weight.mul_(0.5)
    theirs.save_pretrained(tmp_path / "lora")
    tokens = torch.tensor([[1, *range(3, 60, 4)]])
    with torch.no_grad():
        expected = theirs.merge_and_unload().eval()(tokens).logits[0].numpy()
    assert convert(source, tmp_path / "out", tmp_path / "lora") == 0
    got = np.asarray(Llama.load(tmp_path / "out").logits(tokens[0].tolist()))
    plain = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager")
    with torch.no_grad():
        without = plain.eval()(tokens).logits[0].numpy()
    assert np.abs(expected - without).max() > 0.1  # the adapter changes something
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4)
