"""export-hf and verify: what was converted goes back, is what it was, and is checked on the way."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import export
from convert.__main__ import main
from llama_jax import Llama
from llama_jax.weights import manifest
from llama_jax.weights.checkpoint import Tensor, load_checkpoint, save_checkpoint
from tests.helpers.commands import run_py
from tests.helpers.sources import CONFIG_JSON, GQA, MHA, TIED, hf_name, random_weights
from tests.helpers.stories import BOS, PUBLISHED

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
OTHER = {  # no reader's defaults
    "rope_theta": 50_000.0,
    "norm_eps": 1e-4,
    "max_seq_len": 96,
    "rope_factor": 2.5,
    "eos_tokens": (2, 261),
}
CONFIGS = {"gqa": dataclasses.replace(GQA, **OTHER), "mha": MHA, "tied": TIED}


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def root(folder: pathlib.Path) -> str:
    return manifest.read_manifest(folder)["root"]


def saved(path: pathlib.Path, config=GQA, dtype=np.float32, tokenizer=None) -> pathlib.Path:
    weights = random_weights(config, dtype)
    tensors = (Tensor(name, array) for name, array in weights.items())
    model = tokenizer and tokenizer.read_bytes()
    save_checkpoint(path, tensors, config, tokenizer=model)
    return path


def corrupted(path: pathlib.Path) -> pathlib.Path:
    """Give a checkpoint another's tensors: what Orbax itself would restore without a word."""
    weights = random_weights(GQA)
    weights["layer_1/attention/v"][2, 3] += 1
    other = path.with_name("other")
    save_checkpoint(other, [Tensor(name, array) for name, array in weights.items()], GQA)
    values = json.loads((path / "manifest.json").read_text())
    (other / "manifest.json").unlink()
    manifest.write_manifest(other, values["tensors"], values["dtype"], values["origin"])
    shutil.rmtree(path)
    other.rename(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_converts_back_to_the_same_checkpoint(tmp_path, tokenizer, config, dtype):
    first = saved(tmp_path / "first", CONFIGS[config], dtype, tokenizer)
    assert run("export-hf", first, tmp_path / "out") == 0
    assert run("hf", tmp_path / "out", tmp_path / "again") == 0
    assert root(tmp_path / "again") == root(first)
    a, b = load_checkpoint(first), load_checkpoint(tmp_path / "again")
    assert (a.config, a.dtype) == (b.config, b.dtype)
    assert b.tokenizer is not None
    assert b.tokenizer.read_bytes() == tokenizer.read_bytes()
    assert (
        "lm_head.weight" in safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    ) == (config != "tied")


def test_several_files_have_a_right_index(tmp_path, monkeypatch, capsys):
    first = saved(tmp_path / "first")
    monkeypatch.setattr(export, "_FILE_BYTES", 2**16)
    out = tmp_path / "out"
    assert run("export-hf", first, out) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    held = {name: safetensors.numpy.load_file(out / name) for name in files}
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    weights = random_weights(GQA)
    assert index["weight_map"].keys() == {hf_name(path) for path in weights}
    size = sum(array.nbytes for array in weights.values())
    assert index["metadata"]["total_size"] == size
    assert f"to {out}, for transformers to load" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *files,
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    assert run("hf", out, tmp_path / "again") == 0
    assert root(tmp_path / "again") == root(first)


def test_the_config_says_what_the_source_said(tmp_path, hf):
    """All that the reader of a source understands, and nothing else than it had."""
    assert run("hf", hf, tmp_path / "jax") == 0
    assert run("export-hf", tmp_path / "jax", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: values.get(key) for key in CONFIG_JSON if key != "pretraining_tp"} == {
        key: value for key, value in CONFIG_JSON.items() if key != "pretraining_tp"
    }


@pytest.mark.parity
@pytest.mark.parametrize("config", ["gqa", "tied"])
def test_transformers_computes_the_same_from_an_export(tmp_path, monkeypatch, config):
    import torch
    from transformers import LlamaForCausalLM

    scaled = {name: array / 4 for name, array in random_weights(CONFIGS[config]).items()}
    tensors = [Tensor(name, array) for name, array in scaled.items()]
    save_checkpoint(tmp_path / "jax", tensors, CONFIGS[config])
    monkeypatch.setattr(export, "_FILE_BYTES", 2**17)
    assert run("export-hf", tmp_path / "jax", tmp_path / "out") == 0
    theirs, loading = LlamaForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading  # nothing missing, left over or of another shape
    assert theirs.dtype == torch.float32
    tokens = [BOS, *range(3, 60, 4)]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([tokens])).logits[0].numpy()
    got = np.asarray(Llama.load(tmp_path / "jax").logits(tokens))
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_stories260k_goes_around_unchanged(assets, tmp_path):
    import torch
    from transformers import LlamaForCausalLM, LlamaTokenizer

    folder = assets / "stories260k"
    assert run("meta", folder / "meta", tmp_path / "a", "--max_seq_len=512") == 0
    assert run("export-hf", tmp_path / "a", tmp_path / "out") == 0
    assert run("hf", tmp_path / "out", tmp_path / "b") == 0
    assert run("hf", folder / "hf", tmp_path / "c") == 0
    assert root(tmp_path / "a") == root(tmp_path / "b") == root(tmp_path / "c")

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    start = torch.tensor([[BOS]])
    tokens = theirs.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=256, do_sample=False
    )
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == PUBLISHED


def test_corruption_is_named_and_nothing_exported(tmp_path, capsys):
    bad = corrupted(saved(tmp_path / "bad"))
    load_checkpoint(bad)  # sizes and small files are right
    for command in (["verify", bad], ["export-hf", bad, tmp_path / "out"]):
        assert run(*command) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        line = said.err.splitlines()[-1]
        assert line.startswith("error: ")
        assert "layer_1/attention/v is not what was written (params/00000)" in line
        assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_verify_says_the_root(tmp_path, capsys):
    first = saved(tmp_path / "first")
    assert run("verify", first) == 0
    said = capsys.readouterr().out
    assert said == f"{first} is what was written; root {root(first)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("harm", [False, True])
def test_run_verifies_when_asked(tmp_path, harm):
    path = saved(tmp_path / "first")
    if harm:
        corrupted(path)
    request = ("--prompt_tokens=1,5", "--max_tokens=2", "--ignore_eos", "--output=json")
    done = run_py(f"--checkpoint={path}", "--verify", *request)
    if harm:
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "layer_1/attention/v is not what was written" in line
    else:
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["tokens"]) == 2
