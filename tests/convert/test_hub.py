"""Conversion from the Hugging Face hub, which a small server on loopback stands in for."""

import json
import re
import sys
import time
import types

import pytest

from convert import hub as hub_module
from convert.__main__ import main
from llama_jax.errors import InputError
from llama_jax.weights.checkpoint import verify_checkpoint
from tests.helpers.adapters import Q, pair, write_adapter
from tests.helpers.hub_server import COMMIT, NAME
from tests.helpers.sources import write_hf

DEAD = "http://127.0.0.1:9"  # discard: nothing listens there
NO_PAUSES = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)


def convert(*arguments) -> int:
    return main(["hf", *map(str, arguments)])


def error(capsys) -> str:
    """Return the last line on stderr, an error."""
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "arguments",
    [
        (NAME,),
        (f"hf://{NAME}",),
        (f"hf://{NAME}@main",),
        (NAME, "--revision=main"),
        (NAME, f"--revision={COMMIT}"),
    ],
)
def test_a_repository_converts_to_what_its_folder_does(hub, hf, tmp_path, arguments):
    src, *options = arguments
    assert convert(src, tmp_path / "out", *options) == 0
    assert convert(hf, tmp_path / "local") == 0
    assert verify_checkpoint(tmp_path / "out") == verify_checkpoint(tmp_path / "local")
    values = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert values["origin"]["repository"] == NAME
    assert values["origin"]["commit"] == COMMIT
    assert hub.downloaded == ["config.json", "model.safetensors", "tokenizer.model"]


@pytest.mark.parametrize("kind", ["sharded", "bin", "whole and sharded"])
def test_only_the_files_that_are_needed_are_downloaded(hub, hf, weights, tmp_path, kind):
    others = ["README.md", "original/consolidated.00.pth", "flax_model.msgpack", "images/a.png"]
    if kind != "bin":
        others += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    else:
        (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    needed = ["config.json", "tokenizer.model"]
    if kind == "sharded":
        (hf / "model.safetensors").unlink()
        sharded = write_hf(tmp_path / "sharded", weights, shards=2)
        for path in sharded.glob("model*"):
            path.rename(hf / path.name)
            needed += [path.name]
    elif kind == "whole and sharded":
        others += ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]
        needed += ["model.safetensors"]
    else:
        needed += ["pytorch_model.bin"]
    for name in others:
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_text("not needed")
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (hf / name).write_text(json.dumps({name: 1}))  # equal files are downloaded once
        needed += [name]
    snapshot = hub_module.resolve(hub_module.Repository(NAME, "main"))
    folder = hub_module.download(snapshot)
    assert sorted(path.name for path in folder.iterdir()) == sorted(needed) == hub.downloaded


def test_a_second_conversion_downloads_nothing(hub, tmp_path):
    assert convert(NAME, tmp_path / "one") == 0
    hub.log.clear()
    assert convert(NAME, tmp_path / "two") == 0
    assert hub.downloaded == []


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_cached_snapshot_is_converted(
    hub, hub_settings, tmp_path, monkeypatch, offline
):
    assert convert(NAME, tmp_path / "one") == 0
    monkeypatch.setenv(*(("HF_HUB_OFFLINE", "1") if offline else ("HF_ENDPOINT", DEAD)))
    hub_settings()
    assert convert(NAME, tmp_path / "two") == 0
    assert verify_checkpoint(tmp_path / "one") == verify_checkpoint(tmp_path / "two")


def test_without_a_network_or_a_snapshot_the_error_says_so(
    hub, hub_settings, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    hub_settings()
    assert convert(NAME, tmp_path / "out") == 2
    assert re.search(rf"cannot be downloaded from {DEAD} \(.*check the network", error(capsys))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_settings()
    assert convert(NAME, tmp_path / "out") == 2
    assert "unset HF_HUB_OFFLINE" in error(capsys)


def test_a_connection_that_breaks_is_resumed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time", NO_PAUSES)
    hub.cut_after, hub.cuts = 200_000, 1
    assert convert(NAME, tmp_path / "out") == 0
    ranges = [span for _, path, span in hub.log if path.endswith(".safetensors") and span]
    assert ranges == ["bytes=200000-"]
    assert verify_checkpoint(tmp_path / "out")


def test_after_a_connection_that_stays_broken_the_next_run_keeps_whole_files(
    hub, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.file_download.time", NO_PAUSES)
    hub.cut_after, hub.cuts = 0, 10**6
    assert convert(NAME, tmp_path / "out") == 2
    assert re.search("cannot be downloaded .*run the same command again", error(capsys))
    assert not (tmp_path / "out").exists()
    hub.cuts = 0
    hub.log.clear()
    assert convert(NAME, tmp_path / "out") == 0
    assert hub.downloaded == ["model.safetensors"]


def test_a_gated_repository_says_where_to_ask(hub, tmp_path, capsys):
    hub.gated = True
    assert convert(NAME, tmp_path / "out") == 2
    assert re.search(
        rf"{NAME} is gated: ask for access at http.*/{NAME}, then log in with `hf auth login`",
        error(capsys),
    )


def test_a_missing_repository_names_both_possibilities_and_a_near_one(hub, tmp_path, capsys):
    assert convert("org/tiny-lama", tmp_path / "out") == 2
    line = error(capsys)
    assert "org/tiny-lama is neither a folder on this machine nor a repository" in line
    assert f"did you mean {NAME}?" in line
    assert "if it is private, log in" in line


def test_a_missing_revision_names_those_that_there_are(hub, tmp_path, capsys):
    assert convert(NAME, tmp_path / "out", "--revision=mian") == 2
    assert "has no revision 'mian'; did you mean main?" in error(capsys)
    assert convert(f"hf://{NAME}@v9", tmp_path / "out") == 2
    assert "has no revision 'v9'; it has main" in error(capsys)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (500, "wait until the server"),
        (503, "wait until"),
        (401, "log in"),
        (429, "wait some minutes"),
    ],
)
def test_a_server_that_refuses_is_reported_with_its_status(
    hub, tmp_path, capsys, status, remedy, monkeypatch
):
    hub.status = status
    if status == 401:  # what the hub says of a token that is not valid
        monkeypatch.setattr("huggingface_hub.utils._http.REPO_API_REGEX", re.compile("^never$"))
    assert convert(NAME, tmp_path / "out") == 2
    line = error(capsys)
    assert f"HTTP status {status}" in line
    assert remedy in line


def test_a_full_disk_names_the_folder_and_the_setting(hub, tmp_path, capsys, monkeypatch):
    import errno

    from huggingface_hub import file_download

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert convert(NAME, tmp_path / "out") == 2
    assert re.search("the disk of .*home/hub is full; make room or set HF_HOME", error(capsys))


def test_the_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert convert(NAME, tmp_path / "out") == 2
    assert "install the hub extra: pip install 'llama_jax[hub]'" in error(capsys)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["llama-2-7b.Q4_K_M.gguf", "config.json"], "is a GGUF file"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter"),
        (["consolidated.00.pth", "params.json"], "is Meta's release"),
        (["README.md"], r"has no model\*.safetensors or pytorch_model\*.bin \(it has README.md\)"),
    ],
)
def test_a_repository_of_another_kind_is_refused_before_the_download(
    hub, hf, tmp_path, capsys, names, message
):
    for path in hf.iterdir():
        path.unlink()
    for name in names:
        (hf / name).write_text("{}")
    assert convert(NAME, tmp_path / "out") == 2
    assert re.search(f"{NAME} {message}", error(capsys))
    assert hub.downloaded == []


def test_an_adapter_comes_from_the_hub_too(hub, hf, weights, tmp_path):
    base = write_hf(tmp_path / "base", weights)
    for path in hf.iterdir():
        path.unlink()
    write_adapter(tmp_path / "lora", pair(Q, 4, weights))
    for path in (tmp_path / "lora").iterdir():
        path.rename(hf / path.name)
    (hf / "README.md").write_text("not needed")
    assert convert(base, tmp_path / "out", f"--adapter=hf://{NAME}", "--tokenizer=none") == 0
    origin = json.loads((tmp_path / "out" / "manifest.json").read_text())["origin"]
    assert (origin["folder"], origin["adapter"]["repository"]) == ("base", NAME)
    assert hub.downloaded == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_is_the_folder_whatever_its_name(hub, hf, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    hf.rename(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert convert(NAME, tmp_path / "out") == 0
    assert hub.log == []


@pytest.mark.parametrize(
    ("src", "options", "message"),
    [
        ("/no/such/place", (), "does not exist, expected a folder, or ORG/NAME"),
        ("hf://name-alone", (), "does not exist, expected a folder, or ORG/NAME"),
        (f"hf://{NAME}@one", ("--revision=two",), "names a revision, and --revision is two"),
        (".", ("--revision=main",), "is a folder, which has no revision"),
    ],
)
def test_a_source_that_is_neither_is_refused(tmp_path, capsys, src, options, message):
    assert convert(src, tmp_path / "out", *options) == 2
    assert message in error(capsys)


def test_the_destination_is_checked_before_the_download(hub, tmp_path, capsys):
    assert convert(NAME, tmp_path) == 2
    assert "already exists" in error(capsys)
    assert hub.log == []


def test_a_branch_that_moves_during_the_download_is_noticed(hub):
    snapshot = hub_module.resolve(hub_module.Repository(NAME, "main"))
    hub.commit = COMMIT[::-1]
    with pytest.raises(InputError, match="was changed during the download"):
        hub_module.download(snapshot)
