"""Checkpoints from outside: every field, every kind of file, sealed by a digest that is right."""

import json
import os
import pathlib
import shutil
import socket

import jax
import numpy as np
import pytest

from llama_jax import InputError
from llama_jax.regular_file import TEXT_BYTES
from llama_jax.weights import manifest
from llama_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from llama_jax.weights.shards import tensors
from tests.helpers.models import SMALL, random_params

HEX = 64 * "0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(folder, tensors(jax.tree.map(np.asarray, random_params(SMALL))), SMALL)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def reseal(folder: pathlib.Path, **changes):
    """Write what a program would that makes every digest fit."""
    values = json.loads((folder / manifest.NAME).read_text())
    del values["sha256"]
    for name in ("tensors", "files"):
        for path, row in changes.pop(name, {}).items():
            values[name][path] = values[name].get(path, {}) | row
    values |= changes
    values["root"] = manifest.root_digest(values["tensors"], values["dtype"])
    (folder / manifest.NAME).write_text(manifest._text(values))


def write_config(folder: pathlib.Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    digest = manifest.file_digest(path)
    reseal(folder, files={path.name: {"bytes": path.stat().st_size, "sha256": digest}})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"shape": [97, -24]}, "shape is [97, -24], expected one or two positive sizes"),
        ({"shape": [97.0, 24]}, "shape is [97.0, 24], expected one or two positive sizes"),
        ({"shape": [True, 24]}, "shape is [True, 24], expected one or two positive sizes"),
        ({"shape": [2**62, 24]}, "shape is [4611686018427387904, 24], expected one or two"),
        ({"shape": [10**900]}, "shape is [1000000000"),
        ({"shape": []}, "shape is [], expected one or two positive sizes"),
        ({"sha256": "x"}, "sha256 is 'x', expected 64 hexadecimal digits"),
        ({"shard": "../../params/00000"}, "shard is '../../params/00000', expected a folder of"),
        ({"shard": "/etc"}, "shard is '/etc', expected a folder of params, such as 00000"),
        ({"shard": ""}, "shard is '', expected a folder of params, such as 00000"),
        ({"shard": "00001"}, "manifest.json: files has no params/00001; copy or convert"),
    ],
)
def test_a_tensor_s_row_out_of_range(copy, row, expected):
    reseal(copy, tensors={"embed": row})
    assert expected in refused(copy)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("config.json", {"bytes": -1}, "bytes is -1, expected a file's size; copy"),
        ("config.json", {"bytes": 10**900}, "bytes is 1000"),
        ("config.json", {"sha256": "A" * 64}, "expected 64 hexadecimal digits; copy"),
        ("/etc/hostname", {}, "files['/etc/hostname'] is not the path of a file in the folder"),
        ("../secret", {}, "files['../secret'] is not the path of a file in the folder"),
        ("params/../../secret", {}, "is not the path of a file in the folder; copy or"),
        ("a//b", {}, "is not the path of a file in the folder; copy or convert"),
        ("a\\b", {}, "is not the path of a file in the folder; copy or convert"),
        ("a\0", {}, "is not the path of a file in the folder; copy or convert"),
        ("", {}, "is not the path of a file in the folder; copy or convert"),
    ],
)
def test_a_file_s_row_out_of_range(copy, name, row, expected):
    (copy.parent / "secret").write_text("x")
    reseal(copy, files={name: {"bytes": 1, "sha256": HEX} | row})
    assert expected in refused(copy)


def test_a_manifest_without_the_config_is_refused(copy):
    values = json.loads((copy / manifest.NAME).read_text())
    values["files"].pop("config.json")
    reseal(copy, **{name: values[name] for name in ("converter", "origin")})
    text = json.loads((copy / manifest.NAME).read_text())
    del text["sha256"], text["files"]["config.json"]
    (copy / manifest.NAME).write_text(manifest._text(text))
    assert "manifest.json: files has no config.json; copy or convert" in refused(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_layers": 10**6}, "num_layers is 1000000, expected at most 4,096"),
        ({"num_layers": 4096}, "the arrays do not fit config.json; convert the weights again"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904, expected at most 16,777,216"),
        ({"dim": 2**62}, "dim is 4611686018427387904, expected at most 1,048,576"),
        ({"max_seq_len": 2**31}, "max_seq_len is 2147483648, expected at most 2,147,483,647"),
        ({"dim": -24}, "dim is -24, expected a positive number"),
        ({"norm_eps": 1e-300}, "norm_eps is 1e-300, which float32 cannot hold"),
        ({"rope_theta": 10**900}, "rope_theta is inf, expected a positive number"),
        ({"vocab_size": "9" * 10**6}, "expected int"),
        ({"eos_tokens": [*range(-9000, 0)]}, "eos_tokens is [-9000, -8999, "),
        ({f"key{i}": 0 for i in range(9999)}, "and 9,979 more; expected the keys vocab_size"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_out_of_range(copy, change, expected):
    write_config(copy, **change)
    assert expected in refused(copy)


def test_arrays_larger_than_their_files_are_refused_before_they_are_allocated(copy):
    """Both the manifest and the config ask for 1.6 TB."""
    write_config(copy, vocab_size=2**24)
    reseal(copy, tensors={name: {"shape": [2**24, 24]} for name in ("embed", "lm_head")})
    assert "files are smaller than their arrays: params/00000 has " in refused(copy)


def replace_by(kind: str, path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "/dev/zero", "/dev/null", "absent"])
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "params/00000/_METADATA"])
def test_a_file_that_is_none_is_one_line(copy, name, kind, monkeypatch):
    monkeypatch.chdir(copy)  # a socket's path may have 107 bytes
    replace_by(kind, pathlib.Path(name))
    assert str(copy) in refused(copy)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "params/00000/_METADATA"])
def test_a_link_out_of_the_checkpoint_is_refused(copy, name, monkeypatch):
    target = copy.parent / "outside"
    shutil.move(copy / name, target)
    (copy / name).symlink_to(target)
    assert f"{copy / name} is a link out of the checkpoint, expected the file itself" in refused(
        copy
    )
    (copy / name).unlink()
    shutil.move(target, copy / "inside")
    (copy / name).symlink_to(copy / "inside")
    assert load_checkpoint(copy).config == SMALL


def test_a_link_to_the_whole_checkpoint_is_followed(copy):
    (copy.parent / "link").symlink_to(copy)
    assert load_checkpoint(copy.parent / "link").config == SMALL


def test_a_pipe_beside_the_shards_is_refused(copy):
    """Orbax could open it."""
    os.mkfifo(copy / "params" / "00000" / "d" / "x")
    assert "/d/x is neither a file nor a folder; copy or convert the checkpoint" in refused(copy)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_text_file_without_end_is_not_read(copy, name):
    with (copy / name).open("ab") as file:
        file.truncate(2**40)  # without room on the disk
    if name == "config.json":
        reseal(copy, files={name: {"bytes": 2**40, "sha256": HEX}})
    size = f"it has {2**40:,} bytes, expected at most {TEXT_BYTES:,}"
    assert f"{copy / name}: cannot read it ({size}); check the path" in refused(copy)


def test_a_tokenizer_that_is_a_pipe_is_one_line(copy):
    os.mkfifo(copy / "tokenizer.model")
    reseal(copy, files={"tokenizer.model": {"bytes": 0, "sha256": HEX}})
    assert "tokenizer.model is neither a file nor a folder" in refused(copy)
