"""Every command of the README runs as it is written, one after the other, in one folder.

The first two blocks install the package and run these tests, the fifth is the benchmark: `.ci/run`
runs those.
"""

import json
import re
import shutil
import sys

import pytest

from llama_jax.config import ModelConfig
from llama_jax.decode.memory import needed_memory
from llama_jax.decode.plan import accelerator_plan
from tests.helpers import ROOT, sources
from tests.helpers.documents import blocks, run, serving, shell
from tools.demo_corpus import read_corpus

README = (ROOT / "README.md").read_text("utf-8")
SHELL = blocks(README)
PYTHON = blocks(README, "python")


@pytest.fixture
def folder(tmp_path):
    """A folder with run.py."""
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    return tmp_path


@pytest.mark.slow
def test_the_first_two_commands():
    install, test, *_ = SHELL
    assert install.startswith("pip install -e . && python run.py --prompt=")
    assert test == 'pip install -e ".[test]" && pytest\n'
    assert f"```\n{shell(install.split('&& ')[1], ROOT)}```" in README


@pytest.mark.slow
def test_command_line(folder):
    lines = shell(SHELL[7], folder).splitlines()
    story, japan, tale, *_ = lines
    assert story.startswith("Once upon a time a young llama")
    assert japan == "{"
    assert "The capital of Japan is Tokyo." in tale
    assert lines.count("The capital of Italy is Rome.") == 2


@pytest.mark.slow
def test_python(folder):
    output = run([sys.executable, "-W", "error", "-c", PYTHON[2]], folder)
    assert output.startswith("The capital of France is Paris. stop Usage(prompt_tokens=14,")


@pytest.fixture(scope="module")
def port():
    """Of the server that the README starts, which chooses a free one."""
    install, command = SHELL[5].splitlines()
    assert install == 'pip install -e ".[serve]"'
    with serving(command, ROOT) as port:
        yield port


@pytest.mark.slow
def test_curl(folder, port):
    answer = json.loads(shell(SHELL[6].replace("8787", str(port)), folder))
    assert answer["result"]["response"] == "The capital of France is Paris."
    assert answer["result"]["seed"] == 7


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.parametrize("block", [0, 1])
def test_clients(folder, port, block):
    program = PYTHON[block].replace("8787", str(port))
    assert "The capital of France is Paris." in run([sys.executable, "-c", program], folder)


@pytest.mark.slow
def test_your_own_model(folder, hub):
    """The commands for 7B, from a hub on loopback with a small model of that name."""
    hub.name = "meta-llama/Llama-2-7b-chat-hf"
    install, login, convert, chat = SHELL[2].splitlines()
    assert login == "hf auth login"
    assert install == 'pip install -e ".[hub]"'
    shell(convert, folder)
    assert "model.safetensors" in hub.downloaded
    shell(chat, folder)


@pytest.mark.parity
def test_real_weights(folder, weights, tokenizer):
    """The commands for 7B, on folders of their names with small models in them."""
    from tests.helpers.meta_sources import meta_shards, write_meta

    (folder / "Llama-2-7b-chat-hf").parent.mkdir(exist_ok=True)
    hf = sources.write_hf(folder / "Llama-2-7b-chat-hf", weights, max_position_embeddings=512)
    meta = write_meta(folder / "llama-2-7b-chat", meta_shards(weights, sources.GQA, 2))
    for source in (hf, meta):
        shutil.copy(tokenizer, source / "tokenizer.model")
    shell(SHELL[3], folder)


def test_the_memory_table():
    rows = re.findall(r"^\| (\d+B) " + r"\| ([\d.]+) " * 4, README, re.MULTILINE)
    assert [row[0] for row in rows] == ["7B", "13B", "70B"]
    for size, *figures in rows:
        config = ModelConfig.load(ROOT / "configs" / f"llama-2-{size.lower()}.json")
        plan = accelerator_plan("gpu", "float16", "strict")
        needs = [needed_memory(config, plan, *size) for size in ((1, 1024), (1, 4096), (8, 4096))]
        taken = (needs[0].weights, *(need.weights + need.caches for need in needs))
        assert figures == [f"{count / 1e9:.1f}" for count in taken]


def test_the_corpus_is_as_large_as_it_says():
    corpus = read_corpus()
    questions = len(corpus.questions) - len(corpus.tales)
    sizes = f"{questions} questions and answers, {len(corpus.dialogues)} dialogues and\n"
    assert f"{sizes}{len(corpus.tales)} tales" in README


def test_no_other_block_is_left_out():
    assert (len(SHELL), len(PYTHON)) == (8, 3)
