"""A second process starts without compiling; whoever set JAX up differently is left alone."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from llama_jax.decode import compile_cache
from tests.helpers import ROOT

GENERATE = """
import jax
from llama_jax import Llama, use_compile_cache
use_compile_cache()
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
result = Llama.load().generate(prompt="Hello", temperature=0, max_tokens=4)
print(events.count("cache_hits"), events.count("cache_misses"), result.tokens)
"""


def generate(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", GENERATE],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stderr == ""
    hits, misses, tokens = done.stdout.split(" ", 2)
    return int(hits), int(misses), tokens


def entries(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith("-cache"))


def test_a_second_run_compiles_nothing(tmp_path):
    _, misses, tokens = generate(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "llama_jax" / "compiled"
    stored = entries(folder)
    assert misses == len(stored) > 3  # prefill, decode and what is smaller
    assert folder.stat().st_mode & 0o777 == 0o700
    hits, still_missed, again = generate(XDG_CACHE_HOME=str(tmp_path))
    assert entries(folder) == stored
    assert hits == len(stored)
    assert still_missed == 0
    assert again == tokens


@pytest.mark.slow
def test_jax_own_settings_win(tmp_path):
    other = tmp_path / "other"
    home = str(tmp_path / "home")
    generate(XDG_CACHE_HOME=home, JAX_COMPILATION_CACHE_DIR=str(other))
    assert not (tmp_path / "home").exists()
    generate(XDG_CACHE_HOME=home, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    hits, _, _ = generate(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert hits == 0


def test_a_user_without_a_home_is_done_without(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compile_cache.use_compile_cache()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
