"""quantize: the bytes are the law's, the folder is whole, and the model hardly says otherwise."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import comparison, quantization
from convert.__main__ import main
from convert.quantization import quantize_weight
from llama_jax import InputError, Llama
from llama_jax.config import INT8_LABEL
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.nn.shapes import SCALE, shapes_by_path
from llama_jax.weights import manifest
from llama_jax.weights.checkpoint import (
    load_checkpoint,
    open_checkpoint,
    read_tensors,
    save_checkpoint,
    verify_checkpoint,
)
from llama_jax.weights.shards import Tensor, by_path
from tests.helpers.quantization import quantized
from tests.helpers.sources import GQA, TIED, random_weights

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


def law(weight):
    """The law in float64: rounding a quotient of two float32 numbers twice changes none."""
    wide = np.asarray(weight, np.float64)
    scale = (np.abs(wide).max(axis=1) / 127).astype(np.float32)
    values = np.zeros(wide.shape, np.int8)
    for row, s in enumerate(scale.astype(np.float64)):
        if s:
            quotients = (wide[row] / s).astype(np.float32)
            values[row] = np.clip(np.round(quotients), -127, 127)
    return values, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 301), (300, 64)])
def test_the_bytes_are_the_laws(monkeypatch, dtype, shape):
    """With blocks of rows that do not divide them, and numbers of many sizes."""
    monkeypatch.setattr(quantization, "_BLOCK", 1000)
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=shape) * 10.0 ** rng.integers(-6, 3, (shape[0], 1))).astype(dtype)
    weight[shape[0] // 2] = 0
    values, scale = quantize_weight(weight)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    for got, expected in zip((values, scale), law(weight), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not scale[shape[0] // 2]
    assert not values[shape[0] // 2].any()
    assert (np.abs(values.astype(int)).max(axis=1)[scale > 0] == 127).all()


def test_halves_are_rounded_to_even():
    weight = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]], np.float16)
    values, scale = quantize_weight(weight)
    assert scale == [1]
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_is_off_by_more_than_half_a_step(dtype):
    weight = np.random.default_rng(1).normal(size=(40, 300)).astype(dtype)
    values, scale = quantize_weight(weight)
    off = np.abs(values * scale.astype(np.float64)[:, None] - weight.astype(np.float64))
    assert (off <= scale[:, None] * (0.5 + 1e-5)).all()


def saved(path, weights, config=GQA, **about):
    save_checkpoint(path, (Tensor(*each) for each in weights.items()), config, **about)
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("config", [GQA, TIED], ids=["gqa", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_checkpoint(tmp_path, tokenizer, config, dtype, capsys):
    weights = random_weights(config, dtype)
    src = saved(
        tmp_path / "src", weights, config, tokenizer=tokenizer.read_bytes(), origin={"from": "here"}
    )
    dst = tmp_path / "dst"
    assert run("quantize", src, dst, "--weights=int8", "--text=none") == 0
    values, found = open_checkpoint(dst)
    whole = manifest.read_manifest(src)
    name = np.dtype(dtype).name
    assert found == dataclasses.replace(config, quantization="int8")
    assert (values["format_version"], values["dtype"]) == (manifest.QUANTIZED_VERSION, name)
    assert values["root"] != whole["root"]
    assert values["origin"] == {
        "format": "llama_jax",
        "root": whole["root"],
        "origin": {"from": "here"},
    }
    assert f"wrote {INT8_LABEL}, " in (out := capsys.readouterr().out)
    assert f"to {dst}; root {values['root']}" in out
    assert verify_checkpoint(dst) == values["root"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    stored = {tensor.path: tensor.array for tensor in read_tensors(dst)}
    assert {path: array.shape for path, array in stored.items()} == shapes_by_path(found)
    for path, array in stored.items():
        if path + SCALE in stored:
            np.testing.assert_array_equal(array, law(weights[path])[0])
            np.testing.assert_array_equal(stored[path + SCALE], law(weights[path])[1])
        elif not path.endswith(SCALE):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, weights[path])

    loaded = load_checkpoint(dst, "bfloat16")
    assert loaded.tokenizer is not None
    kinds = {(path.endswith(SCALE), str(a.dtype)) for path, a in by_path(loaded.params).items()}
    assert kinds == {(True, "float32"), (False, "int8"), (False, "bfloat16")}
    jax.tree.map(
        np.testing.assert_array_equal,
        loaded.params["layer_1"]["attention"]["q"],
        stored["layer_1/attention/q"],
    )


def test_the_same_source_gives_the_same_root(tmp_path):
    src = saved(tmp_path / "src", random_weights(GQA, np.float16))
    for name in ("one", "two"):
        assert run("quantize", src, tmp_path / name) == 0
    one, two = (manifest.read_manifest(tmp_path / name)["root"] for name in ("one", "two"))
    assert one == two


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, tokenizer, capsys, monkeypatch):
    src = saved(tmp_path / "src", random_weights(GQA, np.float16))
    dst = tmp_path / "dst"

    def mistake(*arguments):
        assert run("quantize", *arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        return line

    assert "does not exist; check the path" in mistake(tmp_path / "none", dst)
    assert "the folder is empty" in mistake(_made(tmp_path / "empty"), dst)
    assert f"{src} already exists; remove it or name another" in mistake(src, src)
    assert "has no tokenizer to read it; drop" in mistake(src, dst, f"--text={tokenizer}")
    (tmp_path / "text").write_bytes(b"\xff")
    whole = saved(tmp_path / "whole", random_weights(GQA), tokenizer=tokenizer.read_bytes())
    assert "not UTF-8 (byte 0)" in mistake(whole, dst, f"--text={tmp_path / 'text'}")
    assert "No such file" in mistake(whole, dst, f"--text={tmp_path / 'nothing'}")
    assert run("quantize", src, dst) == 0
    capsys.readouterr()
    again = mistake(dst, tmp_path / "again")
    assert f"checkpoint {dst} is quantized already, expected float16" in again
    assert f"{dst} is {INT8_LABEL}" in _export_error(dst, tmp_path / "out", capsys)
    monkeypatch.setattr("convert.conversion.shutil.disk_usage", lambda _: _Disk())
    assert "bytes, but its disk has 7 left; make room" in mistake(src, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("dst", "empty", "src", "text", "tokenizer.model", "whole")
    ]


class _Disk:
    free = 7


def _made(path):
    path.mkdir()
    return path


def _export_error(path, out, capsys):
    assert run("export-hf", path, out) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_by_name(tmp_path, value, capsys):
    weights = random_weights(GQA, np.float16)
    weights["layer_1/feed_forward/down"][3, 5] = value
    src = saved(tmp_path / "src", weights)
    assert run("quantize", src, tmp_path / "dst") == 2
    assert "layer_1/feed_forward/down has NaN or infinity" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_manifest_whose_dtypes_do_not_fit_is_refused(tmp_path):
    """Though its digests are right: nothing else would keep a projection's bytes from being read
    as other numbers."""
    src = saved(tmp_path / "src", random_weights(GQA, np.float16))
    assert run("quantize", src, tmp_path / "dst") == 0
    values = json.loads((tmp_path / "dst/manifest.json").read_text())
    (tmp_path / "dst/manifest.json").unlink()
    values["tensors"]["layer_0/attention/q"]["dtype"] = "float16"
    manifest.write_manifest(tmp_path / "dst", values["tensors"], values["dtype"], values["origin"])
    with pytest.raises(InputError, match=r"the arrays do not fit config\.json"):
        load_checkpoint(tmp_path / "dst")


@pytest.mark.slow
def test_the_comparison_is_scores_and_a_divergence(tmp_path, tokenizer, capsys):
    """Held against log-probabilities that are computed here, over windows of 64 tokens."""
    weights = random_weights(GQA, np.float32)
    src = saved(tmp_path / "src", weights, tokenizer=tokenizer.read_bytes())
    text = "the quick brown fox jumps over the lazy dog. " * 3
    (tmp_path / "text").write_text(text)
    assert run("quantize", src, tmp_path / "dst", f"--text={tmp_path / 'text'}") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    found = comparison.compare(src, tmp_path / "dst", text)
    assert str(found) == said
    before, after = (Llama.load(path) for path in (src, tmp_path / "dst"))
    assert found.before == before.score(text).perplexity
    assert found.after == after.score(text).perplexity
    request = before.score_request(text)
    total, count = 0.0, 0
    for begin, end, target in request.windows:
        p, q = (
            np.asarray(jax.nn.log_softmax(llm.logits(request.tokens[begin:end])), np.float64)
            for llm in (before, after)
        )
        rows = slice(target - begin - 1, end - begin - 1)
        total += (np.exp(p) * (p - q))[rows].sum()
        count += end - target
    assert found.num_tokens == count
    assert found.kl == pytest.approx(total / count, rel=1e-3)
    assert found.kl > 0
    assert re.search(r"perplexity [\d,.]+ before, [\d,.]+ after \([+-]\d\.\d\d%\); KL ", said)


def test_a_long_texts_rest_is_left_out_and_said(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(comparison, "MOST_TOKENS", 50)
    src = saved(tmp_path / "src", random_weights(GQA), tokenizer=tokenizer.read_bytes())
    found = comparison.compare(src, src, "the fox " * 100)
    assert (found.before, found.kl, found.num_tokens) == (found.after, 0, 49)
    assert str(found).endswith(f"on 49 tokens; its other {found.left_out:,} were left out")


def test_no_room_to_compare_is_said(tmp_path, tokenizer, monkeypatch, capsys):
    src = saved(tmp_path / "src", random_weights(GQA), tokenizer=tokenizer.read_bytes())
    monkeypatch.setattr("llama_jax.decode.memory.free_memory", lambda: 1000)
    assert run("quantize", src, tmp_path / "dst") == 0
    err = capsys.readouterr().err
    assert f"warning: not compared with {src}: the model needs " in err
    assert load_checkpoint(tmp_path / "dst").config == quantized(GQA)


@pytest.mark.slow
def test_the_demo_model_still_answers(tmp_path, capsys):
    assert run("quantize", DEMO_CHECKPOINT, tmp_path / "dst") == 0
    assert "perplexity" in capsys.readouterr().out
    llm = Llama.load(tmp_path / "dst")
    result = llm.generate(prompt="What is the capital of France?", temperature=0)
    assert result.response == "The capital of France is Paris."
    assert result.quantization == INT8_LABEL


@pytest.mark.slow
def test_stories260k_is_as_good(assets, tmp_path):
    """Within half a percent of float16's perplexity."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    assert run("hf", assets / "stories260k/hf", src, "--dtype=float16") == 0
    assert run("quantize", src, dst) == 0
    found = comparison.compare(src, dst, comparison.SAMPLE)
    assert found.num_tokens > 300
    assert found.after == pytest.approx(found.before, rel=5e-3)
    assert 0 < found.kl < 0.01
    assert jnp.dtype("int8") in {a.dtype for a in jax.tree.leaves(load_checkpoint(dst).params)}
