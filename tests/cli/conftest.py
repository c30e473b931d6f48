"""The command line in this process: as fast as its model is loaded once."""

import io
import pathlib
import sys

import pytest
from absl.testing import flagsaver

from llama_jax import Llama
from llama_jax.cli.main import main, parse_flags
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.source import CHECKPOINT_VARIABLE
from llama_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from llama_jax.weights.shards import tensors
from tests.helpers.demo import load_demo


@pytest.fixture(autouse=True)
def _no_checkpoint_variable(monkeypatch):
    monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def demo():
    return load_demo()


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory):
    """The demo model's checkpoint, without its tokenizer."""
    demo = load_checkpoint(DEMO_CHECKPOINT)
    folder = tmp_path_factory.mktemp("bare") / "checkpoint"
    save_checkpoint(folder, tensors(demo.params), demo.config)
    return folder


@pytest.fixture
def cli(_flags, capsys, monkeypatch, demo):
    """Run a command line; return (exit status, stdout, stderr)."""
    load = Llama.load

    def load_once(path, *, dtype=None, context=None, slots=1, **options):
        same = (dtype, context, slots, options.get("eos_tokens")) == (None, None, 1, None)
        if pathlib.Path(path) == DEMO_CHECKPOINT and same:
            return demo
        return load(path, dtype=dtype, context=context, slots=slots, **options)

    monkeypatch.setattr(Llama, "load", load_once)

    def call(*arguments, stdin=""):
        content = stdin.encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
        with flagsaver.flagsaver():
            try:
                main(parse_flags(["run.py", *arguments]))
                status = 0
            except SystemExit as exit_:
                status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def mistake(cli):
    """Run a command line that is wrong: exit 2, nothing on stdout, one line; return the line."""

    def call(*arguments, stdin="[]"):
        status, out, err = cli(*arguments, stdin=stdin)
        *notes, line = err.splitlines()
        assert (status, out) == (2, "")
        assert line.startswith("error: ")
        assert all(note.startswith("no --checkpoint") for note in notes)
        return line

    return call
