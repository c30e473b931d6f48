"""A second process starts without compiling; whoever set JAX up differently is left alone."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from llama_jax.decode import compile_cache
from tests.helpers import ROOT

GENERATE = """
import jax
from llama_jax import Llama, use_compile_cache
warning = use_compile_cache()
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
result = Llama.load().generate(prompt="Hello", temperature=0, max_tokens=4)
print(events.count("cache_hits"), events.count("cache_misses"), result.tokens, warning)
"""


def generate(before="", **environment):
    """Run GENERATE, which says nothing; return hits, misses, tokens and the warning."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + GENERATE],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stderr == ""
    hits, misses, tokens, warning = re.fullmatch(
        r"(\d+) (\d+) (\[.*\]) (.*)\n", done.stdout
    ).groups()
    return int(hits), int(misses), tokens, warning


def entries(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith("-cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home whose cache was filled by one run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home):
    """What that run returned."""
    return generate(XDG_CACHE_HOME=str(home))


@pytest.mark.slow
def test_a_second_run_compiles_nothing(home, first):
    _, misses, tokens, warning = first
    folder = home / "llama_jax" / "compiled"
    stored = entries(folder)
    assert warning == "None"
    assert misses == len(stored) > 3  # prefill, decode and what is smaller
    assert folder.stat().st_mode & 0o777 == 0o700
    assert generate(XDG_CACHE_HOME=str(home)) == (len(stored), 0, tokens, "None")
    assert entries(folder) == stored


@pytest.mark.slow
def test_jax_own_settings_win(tmp_path):
    other = tmp_path / "other"
    home = str(tmp_path / "home")
    generate(XDG_CACHE_HOME=home, JAX_COMPILATION_CACHE_DIR=str(other))
    assert not (tmp_path / "home").exists()
    generate(XDG_CACHE_HOME=home, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_corrupt_entries_are_removed_with_one_line_and_written_again(home, first):
    _, misses, tokens, _ = first
    folder = home / "llama_jax" / "compiled"
    environment = {"XDG_CACHE_HOME": str(home)}
    stored = entries(folder)
    empty, torn, other = (folder / name for name in stored[:3])
    empty.write_bytes(b"")
    torn.write_bytes(torn.read_bytes()[:-9])
    other.write_bytes(b"not a program")
    said = f"removed 3 corrupt entries of {folder}: these programs are compiled again"
    assert generate(**environment) == (misses - 3, 3, tokens, said)
    assert entries(folder) == stored
    assert all(path.stat().st_size > 100 for path in (empty, torn, other))
    assert generate(**environment) == (misses, 0, tokens, "None")


@pytest.fixture
def unconfigured():
    """JAX without a cache of its own, as in a process that begins."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.mark.usefixtures("unconfigured")
def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = "no cache of compiled programs (Not a directory): each run compiles anew"
    assert compile_cache.use_compile_cache() == said
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_line_for_each_program(tmp_path):
    """By a limit on the size of a file, which fails a write much as a full disk does."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    generate(before=limited, XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.usefixtures("unconfigured")
def test_a_user_without_a_home_is_done_without(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    compile_cache.use_compile_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
