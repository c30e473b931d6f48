"""--convert: weights that are no checkpoint yet."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.hub_server import NAME

PROMPT = ("--prompt=the fox", "--raw", "--max_tokens=2", "--ignore_eos", "--temperature=0")


@pytest.mark.parametrize("place", [pytest.param("folder", marks=pytest.mark.slow), "hub"])
def test_the_second_run_converts_and_downloads_nothing(cli, hub, hf, tmp_path, monkeypatch, place):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    checkpoint = f"--checkpoint={hf if place == 'folder' else f'hf://{NAME}'}"
    status, text, notes = cli(checkpoint, "--convert", *PROMPT)
    assert status == 0
    assert "writing " in notes
    hub.log.clear()
    status, again, notes = cli(checkpoint, "--convert", *PROMPT)
    assert (status, again) == (0, text)
    assert "writing " not in notes
    assert hub.downloaded == []


def test_a_failed_conversion_is_one_line(hf, tmp_path):
    """By a limit on the size of a file; Orbax's threads and log tell the error in pages."""
    program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.argv = ["run.py", "--checkpoint={hf}", "--convert", "--prompt=a"]
runpy.run_path("run.py", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"LLAMA_JAX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["warning:", "writing", "error:"]
    assert "no tokenizer.model" in lines[0]
    assert "cannot be written: is the disk full? " in lines[2]


def test_without_it_the_error_has_the_command(mistake, hf):
    line = mistake(f"--checkpoint={hf}", *PROMPT)
    assert f"run `python -m convert hf {hf} DST` first, or add --convert" in line
    line = mistake(f"--checkpoint=hf://{NAME}", *PROMPT)
    assert f"run `python -m convert hf hf://{NAME} DST` first" in line


def test_it_is_refused_where_no_model_runs(mistake):
    assert "--convert is given" in mistake("--print_prompt_tokens", "--convert", *PROMPT)
