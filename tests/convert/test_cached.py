"""`Llama.load(convert=True)`: converted once, into the user's cache."""

import os
import re
import shutil

import jax
import pytest

from convert import cached, conversion
from convert.__main__ import main
from convert.cached import converted
from llama_jax import InputError, Llama
from llama_jax.weights.atomic_directory import atomic_directory
from llama_jax.weights.checkpoint import load_checkpoint, verify_checkpoint
from llama_jax.weights.stored_tokenizer import load_tokenizer
from tests.helpers.hub_server import COMMIT, NAME


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def conversions(monkeypatch) -> list[conversion.Conversion]:
    """What was converted so far."""
    done = []

    def convert(task, **options):
        done.append(task)
        return conversion.convert(task, **options)

    monkeypatch.setattr(cached, "convert", convert)
    return done


def test_a_folder_is_converted_once(hf, tmp_path, conversions):
    first, second = Llama.load(hf, convert=True), Llama.load(hf, convert=True)
    assert len(conversions) == 1
    assert first.logits([1, 5]).tobytes() == second.logits([1, 5]).tobytes()
    assert main(["hf", str(hf), str(tmp_path / "out")]) == 0
    [path] = (tmp_path / "cache" / "checkpoints").iterdir()
    assert re.fullmatch("hf-[0-9a-f]{16}", path.name)
    assert verify_checkpoint(path) == verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_source_that_changed_is_converted_again(hf, conversions, file):
    first = converted(hf)
    (hf / "README.md").write_text("read by no conversion")
    assert converted(hf) == first
    stat = (hf / file).stat()
    os.utime(hf / file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert converted(hf) != first
    assert len(conversions) == 2


def test_each_dtype_has_a_checkpoint_of_its_own(hf, conversions):
    assert load_checkpoint(converted(hf, "float16")).dtype == "float16"
    assert load_checkpoint(converted(hf)).dtype == "float32"
    assert len(conversions) == 2


def test_a_repository_is_downloaded_and_converted_once(hub, conversions):
    path = converted(f"hf://{NAME}")
    assert hub.downloaded == ["config.json", "model.safetensors", "tokenizer.model"]
    hub.log.clear()
    assert converted(f"hf://{NAME}@main") == path
    assert (len(conversions), hub.downloaded) == (1, [])
    assert conversions[0].origin == {"repository": NAME, "commit": COMMIT}
    hub.commit = COMMIT[::-1]
    assert converted(f"hf://{NAME}") != path


def test_converting_puts_nothing_on_a_device(hf):
    before = len(jax.live_arrays())
    converted(hf)
    assert len(jax.live_arrays()) == before


def test_what_is_a_checkpoint_already_is_loaded_as_it_is(hf, conversions):
    path = converted(hf)
    assert converted(path) == path
    assert len(conversions) == 1
    with pytest.raises(InputError, match="does not exist"):
        Llama.load(hf / "none", convert=True)


def test_a_second_process_waits_for_the_first(hf, tmp_path, monkeypatch, capsys):
    path = converted(hf)
    path.rename(tmp_path / "written")
    other = atomic_directory(path)
    folder = other.__enter__()

    def finish(seconds: float) -> None:
        shutil.copytree(tmp_path / "written", folder, dirs_exist_ok=True)
        other.__exit__(None, None, None)

    monkeypatch.setattr(cached.time, "sleep", finish)
    assert converted(hf) == path
    assert verify_checkpoint(path) == verify_checkpoint(tmp_path / "written")
    assert capsys.readouterr().err.count("waiting for it") == 1


def test_a_cache_that_cannot_be_written_names_the_setting(hf, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, "save_checkpoint", full)
    with pytest.raises(InputError, match=r"No space left.*; \$LLAMA_JAX_CACHE names another"):
        converted(hf)


@pytest.mark.parametrize("load", [Llama.load, load_checkpoint, load_tokenizer])
def test_without_convert_the_error_has_the_exact_command(hf, tmp_path, load):
    spaced = hf.rename(tmp_path / "my weights")
    with pytest.raises(InputError) as caught:
        load(spaced)
    assert f"run `python -m convert hf '{spaced}' DST` first, or add --convert" in str(caught.value)
    with pytest.raises(InputError) as caught:
        load("hf://org/name@v1")
    assert "run `python -m convert hf hf://org/name@v1 DST` first" in str(caught.value)
