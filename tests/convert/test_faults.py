"""What goes wrong around a checkpoint: a kill, a full disk, a second writer, changed bytes."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from convert import __main__ as cli
from convert import conversion, published
from llama_jax import ModelConfig
from llama_jax.errors import InputError
from llama_jax.weights import checkpoint, manifest
from llama_jax.weights import shards as shards_module
from llama_jax.weights.atomic_directory import atomic_directory
from llama_jax.weights.checkpoint import Tensor, load_checkpoint, save_checkpoint, verify_checkpoint
from tests.helpers import ROOT
from tests.helpers.sources import (
    BIN_INDEX,
    GQA,
    assert_same,
    flat,
    random_weights,
    read_hf,
    write_bin,
    write_hf,
)


def convert(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def subprocess_convert(setting: str, *arguments) -> subprocess.Popen:
    """Start a conversion in a process of its own, after a line of Python."""
    program = f"{setting}\nimport runpy; runpy.run_module('convert', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def _late_callbacks(monkeypatch):
    """Drop what TensorStore's other reads say when one has failed and Orbax's loop is closed."""
    say = sys.unraisablehook

    def drop(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            say(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", drop)
    yield
    time.sleep(0.2)


def restored(path: pathlib.Path) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, flat(load_checkpoint(path).params))


# A process killed.

BIG = dataclasses.replace(GQA, dim=128, ffn_dim=512, num_layers=4)  # 1.1 million parameters
SHARD = 2**17


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A source whose conversion makes some twenty shards."""
    folder = tmp_path_factory.mktemp("big")
    config = {"hidden_size": BIG.dim, "intermediate_size": BIG.ffn_dim, "num_hidden_layers": 4}
    return write_hf(folder / "hf", random_weights(BIG), **config)


def kill_while_writing(big: pathlib.Path, folder: pathlib.Path, shards: int, delay: float) -> bool:
    """Kill a conversion once it has begun so many shards; tell whether it was still writing."""
    setting = f"import llama_jax.weights.checkpoint as c; c.SHARD_BYTES = {SHARD}"
    process = subprocess_convert(setting, "hf", big, folder / "new")
    params = folder / ".new.partial" / "new" / "params"
    while process.poll() is None:
        if params.is_dir() and len(list(params.iterdir())) >= shards:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.0005)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_a_killed_conversion_leaves_a_whole_checkpoint_or_none(big, tmp_path, monkeypatch, kills):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", SHARD)
    weights = random_weights(BIG)
    old = tmp_path / "old"
    assert convert("hf", big, old) == 0
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    last = len(list((old / "params").iterdir()))
    assert last > 10

    rng = random.Random(kills)
    moments = [rng.randint(1, last if kills > 1 else 2) for _ in range(kills)]
    if kills > 1:
        moments[:2] = [last, last]  # the manifest, fsync and rename
    killed = 0
    for shards in moments:
        killed += kill_while_writing(big, tmp_path, shards, rng.uniform(0, 0.02))
        new = tmp_path / "new"
        if new.exists():
            verify_checkpoint(new)
            assert_same(restored(new), weights)
            shutil.rmtree(new)
        assert {file: file.read_bytes() for file in old.rglob("*") if file.is_file()} == before

        assert convert("hf", big, new) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
        assert verify_checkpoint(new) == verify_checkpoint(old)
        shutil.rmtree(new)
    assert killed >= kills * 0.7  # else the moments are badly chosen


def test_of_two_writers_the_second_is_refused(tmp_path):
    path = tmp_path / "out"
    with atomic_directory(path) as folder:
        (folder / "first").touch()
        with pytest.raises(InputError, match="out is being written by another process"):  # noqa: SIM117
            with atomic_directory(path):
                pass
        said = []

        def write():
            try:
                save_checkpoint(path, iter(()), GQA)
            except InputError as error:
                said.append(str(error))

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        assert "is being written by another process" in said[0]
        assert (folder / "first").exists()
    assert [file.name for file in path.iterdir()] == ["first"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "out"

    def write():
        with atomic_directory(path) as folder:
            (folder / "ours").touch()
            path.mkdir()

    with pytest.raises(InputError, match="already exists"):
        write()
    assert [file.name for file in tmp_path.rglob("*")] == ["out"]


# A full disk.


@pytest.mark.parametrize(
    ("command", "source", "limit", "file"),
    [
        ("hf", "hf", 1000, "/params/00000"),
        pytest.param("hf", "hf", 100_000, "/params/00000", marks=pytest.mark.slow),
        pytest.param("export-hf", "saved", 9000, "", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    request, tmp_path, command, source, limit, file
):
    """By a limit on the size of a file, which fails a write much as a full disk does."""
    setting = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    folder = request.getfixturevalue(source)
    before = sorted(tmp_path.iterdir())
    process = subprocess_convert(setting, command, folder, tmp_path / "out")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert f"{file} cannot be written: is the disk full? " in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_bug_in_another_thread_is_shown(hf, tmp_path):
    """While the errors of Orbax's own threads are not."""
    setting = """
import sys, threading, llama_jax.weights.checkpoint as checkpoint

def bug(*_):
    raise TypeError("a bug in a thread")

class Finalized:
    def __del__(self):
        raise TypeError("a bug in a finalizer")

def write(*_):
    thread = threading.Thread(target=bug)
    thread.start()
    thread.join()
    Finalized()

checkpoint.write_manifest = write
"""
    process = subprocess_convert(setting, "hf", hf, tmp_path / "out")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    for bug in ("thread", "finalizer"):
        assert f"TypeError: a bug in a {bug}" in err


def test_room_is_checked_beforehand(hf, tmp_path, monkeypatch, capsys):
    """What a killed conversion left counts as room."""
    size = sum(array.nbytes for array in random_weights(GQA).values())
    usage = types.SimpleNamespace(free=size - 1)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    assert convert("hf", hf, tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"out needs {size:,} bytes, but its disk has {size - 1:,} left" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert convert("hf", hf, tmp_path / "half", "--dtype=float16") == 0
    left = tmp_path / ".out.partial" / "out" / "params"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"1")
    assert convert("hf", hf, tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "hf", "out"]


# A checkpoint changed.


@pytest.fixture
def saved(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2**18)
    weights = random_weights(GQA)
    tensors = (Tensor(path, array) for path, array in weights.items())
    save_checkpoint(
        tmp_path / "saved", tensors, GQA, tokenizer=tokenizer and tokenizer.read_bytes()
    )
    return tmp_path / "saved"


def refused(path: pathlib.Path, read=verify_checkpoint) -> str:
    with pytest.raises(InputError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_flipped_byte_in_any_file_is_refused_by_name(saved, monkeypatch):
    large = max((f for f in saved.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)
    for file in sorted(file for file in saved.rglob("*") if file.is_file()):
        name = file.relative_to(saved).as_posix()
        content = file.read_bytes()
        for i in {0, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            assert name in refused(saved, load_checkpoint)
            with monkeypatch.context() as patch:
                patch.setattr(manifest, "_SMALL", 0)  # as if every file were a large one
                assert name in refused(saved, verify_checkpoint)
        file.write_bytes(content)
    monkeypatch.setattr(manifest, "_SMALL", 0)
    large.write_bytes(bytes([large.read_bytes()[0] ^ 1]) + large.read_bytes()[1:])
    assert ", ..." in refused(saved, verify_checkpoint)  # names tensors too


def rewrite(saved: pathlib.Path, weights: dict[str, np.ndarray], config=GQA) -> pathlib.Path:
    """Save other tensors under the manifest's old rows: the sizes fit, the digests do not."""
    other = saved.with_name("other")
    tensors = (Tensor(path, array) for path, array in weights.items())
    save_checkpoint(other, tensors, config, tokenizer=(saved / "tokenizer.model").read_bytes())
    values = manifest.read_manifest(saved)
    shutil.copyfile(saved / "config.json", other / "config.json")
    (other / "manifest.json").unlink()
    manifest.write_manifest(other, values["tensors"], values["dtype"], values["origin"])
    return other


@pytest.mark.usefixtures("_late_callbacks")
def test_a_tensor_of_another_shape_is_named(saved):
    config = dataclasses.replace(GQA, ffn_dim=180)
    other = rewrite(saved, random_weights(config), config)
    for read in (verify_checkpoint, load_checkpoint):
        assert "params/0000" in refused(other, read)


def test_our_own_bug_is_not_called_corruption(saved, tmp_path, monkeypatch):
    """A TypeError of any code, and any type of error that our code raises."""
    folder = saved / "params" / "00000"
    array = np.zeros(3, np.float32)
    abstract = {"a": jax.ShapeDtypeStruct(array.shape, array.dtype)}
    ours = {"__name__": "llama_jax.bug"}
    exec("def bug(*args, **kwargs): raise ValueError('our bug')", ours)

    def bug(*args, **kwargs):
        raise TypeError("a bug")

    for method, use in {
        "restore": lambda: shards_module.read_shard(folder, abstract),
        "save": lambda: shards_module.write_shard(
            tmp_path / "new", [Tensor("a", array)], {"a": None}
        ),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(shards_module.ocp.Checkpointer, method, bug)
            with pytest.raises(TypeError, match="a bug"):
                use()
            patch.setattr(shards_module.ocp.Checkpointer, method, ours["bug"])
            with pytest.raises(ValueError, match="our bug") as caught:
                use()
            assert type(caught.value) is ValueError


# A corrupted source; see also test_convert.py and test_meta.py.

KINDS = [
    pytest.param(write_hf, "model-*.safetensors", "model.safetensors.index.json", id="safetensors"),
    pytest.param(write_bin, "*.bin", BIN_INDEX, id="bin", marks=pytest.mark.parity),
]


@pytest.mark.parametrize(("write", "files", "index"), KINDS)
def test_a_corrupted_shard_is_named(tmp_path, weights, write, files, index):
    folder = write(tmp_path / "hf", weights, 2)
    file = max(folder.glob(files))
    content = file.read_bytes()
    cases = {
        content[:-1000]: "cut short",
        b"": "is empty",
        b" <html>" + b"x" * 99: "is an HTML page",
        b"version https://git-lfs.github.com/spec/v1": "is a git-lfs pointer",
        bytes([content[0] ^ 1]) + content[1:]: "download it again",
    }
    for corrupted, message in cases.items():
        file.write_bytes(corrupted)
        with pytest.raises(InputError, match=f"{file.name} .*{message}") as caught:
            read_hf(folder)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match=f"{index} names files that are missing: {file.name};"):
        read_hf(folder)


@pytest.mark.parametrize(("write", "files", "index"), KINDS)
def test_a_tensor_where_the_index_does_not_place_it_is_named(
    tmp_path, weights, write, files, index
):
    folder = write(tmp_path / "hf", weights, 2)
    values = json.loads((folder / index).read_text())
    placed, moved, lost = values["weight_map"], "lm_head.weight", "model.norm.weight"
    held, (other,) = placed[moved], set(placed.values()) - {placed[moved]}
    placed[moved], holder = other, placed.pop(lost)
    (folder / index).write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_hf(folder)
    for expected in (
        f"{moved} is not in {other}",
        f"{held} holds {moved}, which the index places in {other}",
        f"{holder} holds {lost}, which the index places in no file",
    ):
        assert expected in str(caught.value)


def test_a_flipped_byte_in_a_header_is_refused_or_without_effect(hf, weights):
    """safetensors has no sums: what still reads must be the same tensors."""
    file = hf / "model.safetensors"
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    outcomes = []
    for i in [*range(9), *(rng.randrange(8, size) for _ in range(100))]:
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            _, got = read_hf(hf)
        except InputError:
            outcomes.append("refused")
        else:
            assert_same(got, weights)
            outcomes.append("same")
    assert outcomes.count("refused") > 80


# What is published.


def write_list(folder: pathlib.Path, name: str, *files: str) -> pathlib.Path:
    path = folder / name
    sums = [f"{hashlib.md5((folder / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    path.write_text("".join(sums))
    return path


def test_published_sums(tmp_path):
    for name in ("a.pth", "b.pth", "params.json"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    path = write_list(tmp_path, "checklist.chk", "a.pth", "b.pth", "params.json")
    assert published.check_list(path) == 3
    sums = [line.split() for line in path.read_text().splitlines()]
    path.write_text("".join(f"{md5.upper()} *{name}\n" for md5, name in sums))
    assert published.check_list(path) == 3  # as md5sum --binary writes it

    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[2500] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    (tmp_path / "b.pth").unlink()
    said = refused(path, published.check_list)
    assert str(path) in said
    assert "a.pth is not the published file" in said
    assert "b.pth is missing" in said
    assert "params.json" not in said


@pytest.mark.parametrize(
    "line",
    ["<html>", f"{'0' * 32}", f"{'0' * 32}  ../a.pth", f"{'0' * 31}  a.pth", f"{'0' * 32}  ."],
)
def test_a_list_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "checklist.chk"
    path.write_text(f"{line}\n")
    said = refused(path, published.check_list)
    assert f"{path}: got the line {line!r}, expected an MD5 sum and a file's name" in said


@pytest.mark.parity
def test_the_cli_compares_what_is_published(tmp_path, weights, tokenizer, capsys):
    from tests.helpers.meta_sources import meta_shards, write_meta

    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 2))
    shards = [f"consolidated.{i:02}.pth" for i in range(2)]
    write_list(folder, "checklist.chk", *shards, "params.json")
    write_list(tmp_path, "tokenizer_checklist.chk", tokenizer.name)
    assert convert("meta", folder, tmp_path / "a", "--max_seq_len=64") == 0
    said = capsys.readouterr().err
    assert "\nchecklist.chk: 3 files as published\n" in said
    assert "\ntokenizer_checklist.chk: 1 file as published\n" in said

    for file in (folder / shards[1], tokenizer):
        content = file.read_bytes()
        file.write_bytes(content + b"\0" * 8)
        assert convert("meta", folder, tmp_path / "b", "--max_seq_len=64") == 2
        assert file.name in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "b").exists()
        file.write_bytes(content)


def test_numbers_unlike_the_published_ones_are_reported(tmp_path, weights, capsys):
    preset = ModelConfig.load(ROOT / "configs" / "llama-2-7b.json")
    assert published.differences(preset) == []
    (line,) = published.differences(dataclasses.replace(preset, norm_eps=1e-6))
    assert line.startswith("norm_eps is 1e-06, llama-2-7b")
    assert line.endswith("'s is 1e-05")
    changed = dataclasses.replace(preset, rope_theta=1e6, max_seq_len=2048)
    theta, length = published.differences(changed)
    assert theta.startswith("rope_theta is 1000000.0, ")
    assert theta.endswith(" is 10000.0")
    assert length.startswith("max_seq_len is 2048, ")
    assert published.differences(dataclasses.replace(GQA, norm_eps=1e-6)) == []
