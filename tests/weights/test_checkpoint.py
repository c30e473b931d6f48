import json
import logging
import pathlib
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import InputError
from llama_jax.weights import manifest
from llama_jax.weights.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from llama_jax.weights.quiet import orbax_muted
from llama_jax.weights.shards import tensors
from tests.helpers.models import SMALL, random_params


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, random_params(SMALL))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(folder, tensors(params), SMALL, origin={"source": "a test"})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to corrupt."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(saved, params):
    restored = load_checkpoint(saved)
    assert (restored.config, restored.dtype, restored.tokenizer) == (SMALL, "float32", None)
    assert_equal(restored.params, params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_restored_in_the_runs_dtype(saved, params, dtype):
    restored = load_checkpoint(saved, dtype)
    assert restored.dtype == dtype
    assert {a.dtype for a in jax.tree.leaves(restored.params)} == {jnp.dtype(dtype)}
    assert_equal(restored.params, jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), params))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_come_back_bit_for_bit(tmp_path, params, dtype):
    half = jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), params)
    save_checkpoint(tmp_path / "half", tensors(half), SMALL)
    restored = load_checkpoint(tmp_path / "half")
    assert restored.dtype == dtype
    assert_equal(restored.params, half)


def test_values_beyond_float16_are_refused_by_name(tmp_path, params):
    large = jax.tree.map(np.array, params)
    large["layer_1"]["attention"]["v"][0, 0] = -70_000
    save_checkpoint(tmp_path / "large", tensors(large), SMALL)
    with pytest.raises(InputError, match=r"layer_1/attention/v: the float32 weights exceed"):
        load_checkpoint(tmp_path / "large", "float16")
    assert load_checkpoint(tmp_path / "large", "bfloat16").dtype == "bfloat16"


def test_a_tokenizer_that_was_not_written_with_it_is_not_taken(copy, tokenizer):
    shutil.copyfile(tokenizer, copy / "tokenizer.model")
    assert load_checkpoint(copy).tokenizer is None


def test_per_layer_arrays_and_config_beside_them(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {"params", "config.json", "manifest.json"}
    values = json.loads((saved / "manifest.json").read_text())
    assert values["format_version"] == manifest.FORMAT_VERSION
    assert values["origin"] == {"source": "a test"}


def test_nothing_in_it_says_where_it_was_written(saved):
    for file in saved.rglob("*"):
        assert not file.is_file() or str(saved.parent).encode() not in file.read_bytes(), file


def test_an_existing_folder_is_never_overwritten(saved, params):
    with pytest.raises(InputError, match=r"already exists; remove it or name another folder"):
        save_checkpoint(saved, tensors(params), SMALL)
    assert_equal(load_checkpoint(saved).params, params)


def test_an_interrupted_save_leaves_nothing(tmp_path, params, monkeypatch):
    monkeypatch.setattr(manifest, "file_sizes", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "new", tensors(params), SMALL)
    assert not list(tmp_path.iterdir())


def test_missing(tmp_path):
    assert "does not exist; check the path" in refused(tmp_path / "none")


def test_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file, expected the folder convert wrote" in refused(tmp_path / "file")


def test_empty(tmp_path):
    assert "the folder is empty; name the one that convert wrote" in refused(tmp_path)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("consolidated.00.pth", "run `python -m convert meta"),
        ("model.safetensors", "run `python -m convert hf"),
        ("notes.txt", "the checkpoint is incomplete"),
    ],
)
def test_weights_not_converted_yet(tmp_path, file, remedy):
    (tmp_path / file).write_text("x")
    assert remedy in refused(tmp_path)


def test_another_version(copy):
    values = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(values | {"format_version": 99}))
    assert "has format version 99, this program reads 2 and 3" in refused(copy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "manifest.json: not JSON"),
        ("[" * 100_000, "nested deeper than 64); copy or convert the checkpoint again"),
        ("[]", "manifest.json: got a list, expected a JSON object; copy or convert the checkpoint"),
        ("{}", "has format version None, this program reads 2 and 3"),
        ('{"format_version": 2}', "manifest.json was changed after it was written"),
        ('{"format_version": 2, "sha256": [1]}', "manifest.json was changed after it was written"),
    ],
)
def test_corrupted_manifest(copy, text, expected):
    (copy / "manifest.json").write_text(text)
    assert expected in refused(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": None}, " has no dtype, expected a string"),
        ({"dtype": 16}, ": dtype is 16, expected a string"),
        ({"dtype": "int8"}, ": dtype is 'int8', expected one of float16, bfloat16, float32"),
        ({"origin": None}, " has no origin, expected an object"),
        ({"root": None}, " has no root, expected a string"),
        ({"tensors": None}, " has no tensors, expected an object"),
        ({"tensors": []}, ": tensors is [], expected an object"),
        ({"tensors": {"a/b": 1}}, ": tensors['a/b'] is 1, expected an object"),
        ({"tensors": {"a": {"shape": "x"}}}, ": tensors['a']: shape is 'x', expected a list"),
        ({"tensors": {"a": {"shape": []}}}, ": tensors['a'] has no sha256, expected a string"),
        ({"files": None}, " has no files, expected an object"),
        ({"files": {"a": {"bytes": True}}}, ": files['a']: bytes is True, expected an integer"),
        ({"files": {"a": {"bytes": 1}}}, ": files['a'] has no sha256, expected a string"),
    ],
)
def test_a_manifest_of_another_form_is_refused(copy, change, expected):
    """Even where its own digest is right; None leaves a field out."""
    path = copy / manifest.NAME
    values = json.loads(path.read_text()) | change
    values = {name: value for name, value in values.items() if value is not None}
    del values["sha256"]
    path.write_text(manifest._text(values))
    assert refused(copy) == f"{path}{expected}; copy or convert the checkpoint again"


def test_other_weights_under_the_root_of_these_are_refused(saved, params, tmp_path):
    """Even where every other digest was made to fit: the root is what two checkpoints share."""
    other = tmp_path / "other"
    changed = params | {"final_norm": 2 * params["final_norm"]}
    save_checkpoint(other, tensors(changed), SMALL, origin={"source": "a test"})
    honest, values = (manifest.read_manifest(folder) for folder in (saved, other))
    assert values["root"] != honest["root"]
    written = values["root"]
    values["root"] = honest["root"]
    text = json.dumps(values | {"sha256": manifest._json_digest(values)})
    (other / manifest.NAME).write_text(text, encoding="utf-8")
    for read in (load_checkpoint, verify_checkpoint):
        with pytest.raises(InputError) as error:
            read(other)
        assert str(error.value) == (
            f"{other / manifest.NAME} has the root {honest['root']}, but its tensors have "
            f"{written}; copy or convert the checkpoint again"
        )


def test_manifest_is_a_folder(copy):
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").mkdir()
    assert "manifest.json: cannot read it (Is a directory); check the path" in refused(copy)


def test_a_folder_that_may_not_be_read(saved, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "file_sizes", deny)
    assert "cannot be read (Permission denied); check the path" in refused(saved)


def test_home_is_expanded(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_checkpoint("~/checkpoint").config == SMALL


@pytest.mark.parametrize("name", ["params", "config.json", "manifest.json"])
def test_half_there(copy, name):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert f"has no {name}; the checkpoint is incomplete" in refused(copy)


def test_every_missing_or_shortened_file_is_named(saved, tmp_path):
    files = [p.relative_to(saved) for p in saved.rglob("*") if p.is_file()]
    files = [f for f in files if f.name != "manifest.json"]
    assert len(files) > 5
    for i, name in enumerate(files):
        for kind in ("missing", "short"):
            folder = pathlib.Path(shutil.copytree(saved, tmp_path / f"{kind}{i}"))
            file = folder / name
            if kind == "missing":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-1])
            assert name.as_posix() in refused(folder)


def test_a_changed_config_is_refused(copy):
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"ffn_dim": 40', '"ffn_dim": 41'))
    assert "changed after being written: config.json" in refused(copy)


def test_arrays_of_another_model(copy):
    """By a manifest that was made for them."""
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"ffn_dim": 40', '"ffn_dim": 41'))
    values = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    manifest.write_manifest(copy, values["tensors"], values["dtype"], {})
    assert "the arrays do not fit config.json" in refused(copy)


def test_unknown_dtype(saved):
    with pytest.raises(InputError, match="dtype is 'int8', expected one of float16"):
        load_checkpoint(saved, "int8")


@pytest.mark.parametrize("dtype", [jnp.float16, np.float16, np.dtype("float16"), "f2"])
def test_a_dtype_may_be_any_that_jax_takes(saved, dtype):
    assert load_checkpoint(saved, dtype).dtype == "float16"


@pytest.mark.parametrize("dtype", [float, "fp16", "", np.int8, 16])
def test_other_dtypes_are_refused_with_the_list(saved, dtype):
    with pytest.raises(InputError, match="expected one of float16, bfloat16, float32"):
        load_checkpoint(saved, dtype)


def test_orbax_is_muted_only_while_it_works(monkeypatch):
    """A server's threads and log are shown after it has loaded."""
    for name in ("absl", "asyncio"):  # an error before, in this process, leaves them muted
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)

    def settings():
        levels = [logging.getLogger(name).level for name in ("absl", "asyncio")]
        return [threading.excepthook, sys.unraisablehook, *levels]

    before = settings()
    with orbax_muted():
        assert all(a != b for a, b in zip(before, settings(), strict=True))
    assert settings() == before
