"""Every command of the README runs as it is written, one after the other, in one folder.

The first two blocks install the package and run these tests, the fourth is the benchmark: `.ci/run`
runs those.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import sources

from tools.demo_corpus import read_corpus

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(command, folder):
    environment = {k: v for k, v in os.environ.items() if k != "LLAMA_JAX_CHECKPOINT"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def shell(block, folder):
    return run(["bash", "-euo", "pipefail", "-c", block], folder)


@pytest.fixture
def folder(tmp_path):
    """A folder with run.py."""
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    return tmp_path


def test_the_first_two_commands():
    install, test, *_ = SHELL
    assert install.startswith("pip install -e . && python run.py --prompt=")
    assert test == 'pip install -e ".[test]" && pytest\n'
    assert f"```\n{shell(install.split('&& ')[1], ROOT)}```" in README


def test_command_line(folder):
    story, japan, tale, *_ = shell(SHELL[4], folder).splitlines()
    assert story.startswith("Once upon a time a young llama")
    assert japan == "{"
    assert "The capital of Japan is Tokyo." in tale


def test_python(folder):
    (block,) = PYTHON
    output = run([sys.executable, "-W", "error", "-c", block], folder)
    assert output.startswith("The capital of France is Paris. stop {'prompt_tokens': 14,")


@pytest.mark.parity
def test_real_weights(folder, weights, tokenizer):
    """The commands for 7B, on folders of their names with small models in them."""
    from test_convert_meta import meta_shards, write_meta

    (folder / "Llama-2-7b-chat-hf").parent.mkdir(exist_ok=True)
    hf = sources.write_hf(folder / "Llama-2-7b-chat-hf", weights, max_position_embeddings=512)
    meta = write_meta(folder / "llama-2-7b-chat", meta_shards(weights, sources.GQA, 2))
    for source in (hf, meta):
        shutil.copy(tokenizer, source / "tokenizer.model")
    shell(SHELL[2], folder)


def test_the_corpus_is_as_large_as_it_says():
    corpus = read_corpus()
    questions = len(corpus.questions) - len(corpus.tales)
    sizes = f"{questions} questions and answers, {len(corpus.dialogues)} dialogues and\n"
    assert f"{sizes}{len(corpus.tales)} tales" in README


def test_no_other_block_is_left_out():
    assert (len(SHELL), len(PYTHON)) == (5, 1)
