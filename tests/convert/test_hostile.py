"""Published files from outside: sizes, fields and kinds of file that no model has."""

import json
import os
import pathlib
import struct
import zipfile

import pytest

from convert import __main__ as cli
from llama_jax.regular_file import TEXT_BYTES
from tests.helpers.sources import BIN_INDEX, GQA, write_bin, write_hf


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert; return the one line of the refusal, after which nothing is left."""

    def call(folder: pathlib.Path, layout: str = "hf", *more: str) -> str:
        assert cli.main([layout, str(folder), str(tmp_path / "out"), *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert not (tmp_path / "out").exists()
        line = err.splitlines()[-1]
        assert line.startswith("error: ")
        assert len(line) < 2100
        return line

    return call


def edit(path: pathlib.Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 10**6}, "num_layers is 1000000, expected at most 4,096"),
        ({"num_hidden_layers": 4096}, "the tensors are not those of a Llama of this config"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904, expected at most"),
        ({"hidden_size": 2**62}, "dim is 4611686018427387904, expected at most 1,048,576"),
        ({"max_position_embeddings": 10**900}, "max_seq_len is 1000"),
        (
            {
                "max_position_embeddings": 10**900,
                "rope_scaling": {"type": "linear", "factor": 1.5},
            },
            "max_seq_len is 1000",
        ),
        ({"rope_scaling": 5}, "rope_scaling is 5, expected none, or the type default or linear"),
        ({"rope_scaling": {"type": []}}, "rope_scaling is {'type': []}, expected none"),
        ({"head_dim": "x" * 10**6}, "head_dim is 'xxxxxxx"),
        ({"eos_token_id": [[]]}, "eos_tokens is [[]], expected one or more ids below"),
        ({"rms_norm_eps": 1e300}, "norm_eps is 1e+300, which float32 cannot hold"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_out_of_range(hf, refused, change, expected):
    edit(hf / "config.json", **change)
    assert expected in refused(hf)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_layers": 10**6}, "n_layers of params.json is 1,000,000, but there are "),
        ({"n_layers": 10**900}, "expected a whole number from 1 to 16,777,216"),
        ({"dim": 2**62}, "dim is 4611686018427387904, expected a whole number from 1 to"),
        ({"dim": 2**24, "ffn_dim_multiplier": 99.5}, "of params.json make "),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904, expected at most"),
        ({"norm_eps": -1}, "norm_eps is -1.0, expected a positive number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_params_out_of_range(tmp_path, weights, refused, change, expected):
    from tests.helpers.meta_sources import meta_shards, write_meta  # needs torch

    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 2))
    edit(folder / "params.json", **change)
    assert expected in refused(folder, "meta")


def replace_by(kind: str, path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "absent"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.model"),
        *("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
        "checklist.chk",
    ],
)
def test_a_file_that_is_none_is_one_line(hf, tokenizer, refused, name, kind):
    (hf / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    replace_by(kind, hf / name)
    if (name, kind) == ("checklist.chk", "absent"):
        (hf / name).unlink()
        (hf / name).write_text("no sum\n")
    line = refused(hf)
    assert name in line or (name, kind) == ("config.json", "absent")


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero"])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", BIN_INDEX, "pytorch_model-00001-of-00002.bin"]
)
def test_pytorch_s_file_that_is_none_is_one_line(tmp_path, weights, refused, name, kind):
    folder = write_bin(tmp_path / "bin", weights, shards=1 if name == "pytorch_model.bin" else 2)
    replace_by(kind, folder / name)
    assert f"{name}: cannot read it (" in refused(folder)


def test_a_header_of_any_size_is_not_read(hf, refused):
    with (hf / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)  # without room on the disk
    expected = f"has a header of {2**30:,} bytes, expected at most {TEXT_BYTES:,}"
    assert f"model.safetensors {expected}; download it again" in refused(hf)


@pytest.mark.parametrize(
    "name", ["..", ".", "../model.safetensors", "/etc/hostname", 5, "", "é" * 128]
)
def test_an_index_names_files_beside_it_only(tmp_path, weights, refused, name):
    folder = write_hf(tmp_path / "hf", weights, shards=2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=places | {"model.norm.weight": name})
    assert f"weight_map names {name!r:.80}, expected files beside it" in refused(folder)


def test_a_shard_s_name_says_how_many_are_listed_at_most(hf, refused):
    (hf / "model.safetensors").rename(hf / "model-00001-of-99999999999.safetensors")
    assert "a shard's name says that there are 99999999999, expected at most 10,000" in refused(hf)


@pytest.mark.parity
def test_parts_that_could_grow_are_not_read(tmp_path, weights, refused):
    """A compressed part of a PyTorch file becomes a thousand times its size."""
    folder = write_bin(tmp_path / "bin", weights)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(TEXT_BYTES + 1))
    expected = f"a pickle of {TEXT_BYTES + 1:,} bytes, expected at most {TEXT_BYTES:,}"
    assert f"pytorch_model.bin has compressed parts, or {expected}" in refused(folder)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["meta", "expanded"])
def test_a_shape_without_data_is_no_tensor(tmp_path, weights, refused, kind):
    import torch

    folder = write_bin(tmp_path / "bin", weights)
    path = folder / "pytorch_model.bin"
    named = torch.load(path)
    norm = torch.empty(64, device="meta") if kind == "meta" else torch.ones(1).expand(2**40)
    torch.save(named | {"model.norm.weight": norm}, path)
    assert "'model.norm.weight' is no dense tensor with a name" in refused(folder)


def fast(tokens, **model):
    """A tokenizer.json of almost the right form."""
    base = {"type": "BPE", "byte_fallback": True, "vocab": {"<unk>": 0, "<s>": 1}, "merges": []}
    return {"model": base | model, "added_tokens": tokens}


@pytest.mark.parametrize(
    "values",
    [
        fast([], vocab={"a": []}),
        fast([], vocab={"a": 0, "": 1}),
        fast([], vocab={"\ud800": 0}),
        fast([], vocab={"x" * 10**6: 0}),
        fast([], merges=5),
        fast([], merges=[5]),
        fast([], merges=[[[], []]]),
        fast([]) | {"normalizer": 5},
        fast([]) | {"normalizer": {"normalizers": 5}},
        fast([]) | {"pre_tokenizer": "x"},
        fast(5),
        fast([{"id": 10**900, "content": "x"}]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_tokenizer_of_another_form(hf, refused, values):
    (hf / "tokenizer.json").write_text(json.dumps(values))
    assert "tokenizer.json is no Llama 2 tokenizer: " in refused(hf)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("added_tokens.json", {"x": 10**900}),
        ("added_tokens.json", {"\ud800": 300}),
        ("added_tokens.json", {"x": "y"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: "x"}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_added_tokens_of_another_form(hf, tokenizer, refused, name, values):
    (hf / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (hf / name).write_text(json.dumps(values))
    assert f"{name}: " in refused(hf)


def test_names_with_control_characters_do_not_reach_the_terminal(hf, refused):
    edit(hf / "config.json", **{"quantization_config": {"quant_method": "\x1b[2J\u202e"}})
    assert "is quantized (\\x1b[2J\\u202e), expected" in refused(hf)


@pytest.mark.parametrize("pattern", ["(a+)+", "(.|.)*b", ".*.*.*.*x", "x" * 1001, "a{9}{9}{9}{9}"])
def test_patterns_that_take_for_ever_are_refused(hf, tmp_path, refused, pattern):
    """PEFT matches an adapter's patterns with every module's name."""
    lora = tmp_path / "lora"
    lora.mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {pattern: 2}}
    (lora / "adapter_config.json").write_text(json.dumps(values))
    expected = "expected regular expressions with few repetitions, and values"
    assert expected in refused(hf, "hf", f"--adapter={lora}")


@pytest.mark.parametrize("name", ["..", "../secret", "x" * 256])
def test_a_list_of_checksums_names_files_beside_it_only(hf, refused, name):
    (hf / "checklist.chk").write_text(f"{32 * '0'}  {name}\n")
    assert "checklist.chk: got the line '000000" in refused(hf)
