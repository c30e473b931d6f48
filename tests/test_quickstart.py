"""The quickstart runs as for a newcomer, its installation too, and stores what it says today."""

import os
import re
import subprocess

import nbformat
import pytest

from llama_jax.cli.estimate import most_slots
from llama_jax.config import ModelConfig
from llama_jax.decode.chips import CHIPS, GIB, Chip
from llama_jax.decode.plan import accelerator_plan
from tests.helpers import ROOT, hub_server
from tests.helpers.notebooks import QUICKSTART, images, printed
from tools.demo_corpus import read_corpus
from tools.run_notebook import OFFLINE, copy_checkout, execute, make_environment

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.notebook]

CAPITALS = ["Rome", "Tokyo", "Oslo", "Lima", "Madrid", "Stockholm"]


def read():
    return nbformat.read(QUICKSTART, as_version=4)


def source(name):
    (text,) = (cell.source for cell in read().cells if cell.id == name)
    return text


@pytest.fixture(scope="module")
def executed(native_kernels, tmp_path_factory):
    """The notebook, run in a copy of the checkout, in an environment without llama_jax.

    Its cell installs the copy there, and builds the kernels, from packages that are at hand: no
    network, and this environment's own installation stays as it is.
    """
    folder = tmp_path_factory.mktemp("quickstart")
    notebook = read()
    execute(notebook, copy_checkout(folder) / "notebooks", make_environment(folder), **OFFLINE)
    return notebook


@pytest.fixture(scope="module")
def outputs(executed):
    return printed(executed)


def test_stored_outputs_are_those_of_today(executed):
    """`python -m tools.run_notebook notebooks/quickstart.ipynb` stores them again."""
    stored = read()
    assert printed(stored) == printed(executed)
    assert images(stored).keys() == images(executed).keys() == {"chart"}


def test_stored_outputs_are_small_and_of_one_run():
    stored = read()
    codes = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == [*range(1, len(codes) + 1)]
    assert {each.get("name", "stdout") for cell in codes for each in cell.outputs} == {"stdout"}
    [picture] = images(stored)["chart"]
    assert len(picture) < 80_000
    assert str(ROOT) not in QUICKSTART.read_text("utf-8")


def test_installation_has_the_kernels(outputs):
    assert outputs["clone"].startswith("checkout: ")
    assert "CPU kernels: True" in outputs["devices"]


def test_7b_does_not_fit_a_t4_by_default(outputs):
    default, more = outputs["estimate"].split("\n\n")[:2]
    assert "does not fit; no slots of 1,024 tokens do (75% of it" in default
    assert " fits; 1 slots of 1,024 tokens do (95% of it" in more


def test_table_of_devices_is_computed():
    config = ModelConfig.load(ROOT / "configs" / "llama-2-7b.json")
    l4 = Chip("l4", "gpu", 22 * GIB, 300e9, 121e12)
    rows = {
        "T4": ("16 GB", CHIPS["t4"]),
        "L4": ("24 GB", l4),
        "A100": ("40 GB", CHIPS["a100-40"]),
        "TPU v5e-1": ("16 GB", CHIPS["v5e"]),
        "TPU v6e-1": ("32 GB", CHIPS["v6e"]),
    }
    expected = []
    for name, (memory, chip) in rows.items():
        cells = [name, memory]
        for fraction in (0.75, 0.95):
            room = int(chip.memory * (fraction if chip.platform == "gpu" else 1))
            plan = accelerator_plan(chip.platform, "bfloat16")
            counts = [most_slots(config, plan, context, room) for context in (4096, 1024)]
            cells.append(" / ".join(str(count or "–") for count in counts))
        expected.append(f"| {' | '.join(cells)} |")
    table = [line for line in source("devices-table").splitlines() if line.startswith("| ")]
    assert table[1:] == expected


def test_generate(outputs):
    answer, ending = outputs["generate"].splitlines()
    assert answer == "The capital of France is Paris."
    assert ending.startswith("stop Usage(prompt_tokens=14,")


def test_parameters(outputs):
    sentence, error = outputs["parameters"].splitlines()
    assert sentence.startswith("Once upon a time a young llama")
    assert "." not in sentence
    assert error == "unknown parameter 'temprature', did you mean temperature?"


def test_stream(outputs):
    tale, count = outputs["stream"].split("\n\n")
    assert tale in read_corpus().tales
    assert re.fullmatch(r"\d+ tokens\n", count)


def test_same_seed_is_the_same_text(outputs):
    one, again, other = outputs["seeds"].splitlines()
    assert one == again
    assert one.startswith("1 '")
    assert one[2:] != other[2:]
    assert outputs["replay"] == "the same seed: True\nthe same tokens: True\n"


def test_chat(outputs):
    assert "🦙 Nice to meet you, Ada!" in outputs["chat"]
    assert "🦙 Your name is Ada." in outputs["chat"]
    assert "(0 of " in outputs["chat"]


def test_batch_is_in_order_and_as_if_alone(outputs):
    *answers, comparison = outputs["batch"].splitlines()
    assert [answer.endswith(f" is {c}.") for answer, c in zip(answers, CAPITALS, strict=True)] == [
        True
    ] * 6
    assert comparison == "as if alone: True"


def test_measured_seeds_agree_with_themselves_alone(outputs):
    same, other = outputs["measure"].splitlines()
    assert same == "same seed: {64} tokens in common"
    assert int(re.findall(r"\d+", other)[0]) < 64  # this is what seeds are for


def test_logprobs(outputs):
    """The demo is sure of what it learnt, and of nothing else."""
    learnt, unheard = outputs["logprobs"].split("The old fox\n")
    sure, unsure = (
        [float(percent) for percent in re.findall(r" (\d+\.\d)% ", part)]
        for part in (learnt, unheard)
    )
    assert min(sure) > 95
    assert min(unsure) < 80
    assert (len(sure), len(unsure)) == (8, 8)


def test_server_says_what_the_model_says_without_it(outputs):
    tale, comparison = outputs["ask"].rsplit("\n", 2)[:2]
    assert comparison == "as without a server: True"
    assert outputs["ask-stream"] == tale
    assert outputs["ask-card"] == "The capital of France is Paris.\n"
    assert outputs["clients"].splitlines() == outputs["batch"].splitlines()[:-1]
    assert outputs["stop"] == "exit status: 0\n"


def test_repository_is_cloned_where_there_is_no_checkout(tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    (origin / "llama_jax").mkdir(parents=True)
    for name in ("setup.py", "llama_jax/__init__.py"):
        (origin / name).touch()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", origin]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.chdir(tmp_path)
    cell = source("clone")
    with pytest.raises(ValueError, match="set REPOSITORY to the address"):
        exec(cell, {})
    address = cell.replace('REPOSITORY = ""', f'REPOSITORY = "{origin.as_uri()}"')
    exec(address, {})
    assert os.getcwd() == str(tmp_path / "llama_jax")
    monkeypatch.chdir(tmp_path)
    exec(cell, {})  # it is there
    assert os.getcwd() == str(tmp_path / "llama_jax")


def run_own_model(*names):
    """Run some of the cells with OWN_MODEL set; return what they print."""
    notebook = read()
    cells = {cell.id: cell for cell in notebook.cells}
    settings = cells["settings"].source
    settings = settings.replace("OWN_MODEL = False", "OWN_MODEL = True")
    cells["settings"].source = settings.replace("meta-llama/Llama-2-7b-chat-hf", hub_server.NAME)
    notebook.cells = [cells[name] for name in ("clone", "settings", *names)]
    execute(notebook, QUICKSTART.parent)
    return printed(notebook)


def test_own_model_is_downloaded_once_and_served(hub, tmp_path, monkeypatch):
    config = hub.folder / "config.json"
    wider = config.read_text().replace(
        '"max_position_embeddings": 64', '"max_position_embeddings": 1024'
    )
    config.write_text(wider)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    first = run_own_model("load", "checkpoint", "own", "server", "ask", "stop")
    assert first["checkpoint"].endswith("checkpoint: tiny-llama\n")
    assert "as without a server: True" in first["ask"]
    assert "model.safetensors" in hub.downloaded
    assert "Bearer hf_of_the_user" in hub.authorizations
    hub.log.clear()
    again = run_own_model("load", "checkpoint", "own")
    assert again["checkpoint"] == "checkpoint: tiny-llama\n"
    assert again["own"] == first["own"]
    assert hub.log == []
