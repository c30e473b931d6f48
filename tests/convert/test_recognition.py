"""A source that cannot be read is called what it is, with what to do."""

import json

import pytest

from convert.__main__ import main
from tests.helpers.sources import write_hf


@pytest.mark.parametrize(
    ("file", "what", "remedy"),
    [
        ("adapter_config.json", "a LoRA adapter", "--adapter"),
        ("consolidated.00.pth", "Meta's release", "python -m convert meta"),
        ("llama-2-7b.Q4_K_M.gguf", "a GGUF file", "convert the model"),
        ("__0_0.distcp", "FSDP", "dcp_to_torch"),
        ("zero_to_fp32.py", "DeepSpeed", "run the zero_to_fp32.py"),
        ("llama.nemo", "NeMo", "export it"),
        ("model.onnx", "ONNX", "convert the model"),
        ("flax_model.msgpack", "Flax", "from_flax=True"),
        ("tf_model.h5", "TensorFlow", "convert the model"),
        ("manifest.json", "checkpoint of llama_jax", "--checkpoint"),
    ],
)
def test_a_folder_of_another_kind_is_recognized(tmp_path, capsys, file, what, remedy):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / file).write_text("{}")
    (folder / "config.json").write_text("{}")
    assert main(["hf", str(folder), str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder} is ")
    assert what in line
    assert remedy in line


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"PK\x03\x04", "an archive or a PyTorch file"),
        (b"\x1f\x8b\x08", "a compressed archive"),
        (b"anything", "is a file; expected a folder"),
    ],
)
def test_a_file_is_recognized_by_its_first_bytes(tmp_path, capsys, content, what):
    (tmp_path / "file").write_bytes(content)
    assert main(["hf", str(tmp_path / "file"), str(tmp_path / "out")]) == 2
    assert what in capsys.readouterr().err


def test_an_adapter_beside_whole_weights_is_no_obstacle(tmp_path, weights):
    folder = write_hf(tmp_path / "hf", weights)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert main(["hf", str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("place", ["gs://bucket/llama", "s3://bucket/llama", "http://host/llama"])
def test_a_url_is_refused(place, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["meta", "source", place])
    assert f"{place!r} is a URL, expected a path on this machine" in capsys.readouterr().err


def test_tilde_is_the_home_folder(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_hf(tmp_path / "hf", weights)
    assert main(["hf", "~/hf", "~/out"]) == 0
    assert (tmp_path / "out" / "manifest.json").exists()
