"""--convert: weights that are no checkpoint yet."""

import pytest

from tests.helpers.hub_server import NAME

PROMPT = ("--prompt=the fox", "--raw", "--max_tokens=2", "--ignore_eos", "--temperature=0")


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_second_run_converts_and_downloads_nothing(cli, hub, hf, tmp_path, monkeypatch, place):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    checkpoint = f"--checkpoint={hf if place == 'folder' else f'hf://{NAME}'}"
    status, text, notes = cli(checkpoint, "--convert", *PROMPT)
    assert status == 0
    assert "writing " in notes
    hub.log.clear()
    assert cli(checkpoint, "--convert", *PROMPT)[:2] == (0, text)
    assert "writing " not in cli(checkpoint, "--convert", *PROMPT)[2]
    assert hub.downloaded == []


def test_without_it_the_error_has_the_command(mistake, hf):
    line = mistake(f"--checkpoint={hf}", *PROMPT)
    assert f"run `python -m convert hf {hf} DST` first, or add --convert" in line
    line = mistake(f"--checkpoint=hf://{NAME}", *PROMPT)
    assert f"run `python -m convert hf hf://{NAME} DST` first" in line


def test_it_is_refused_where_no_model_runs(mistake):
    assert "--convert is given" in mistake("--print_prompt_tokens", "--convert", *PROMPT)
