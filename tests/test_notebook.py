"""The notebook runs from its first cell to its last, and says what it should."""

import json
import os
import re

import nbclient
import nbformat
import pytest

from tests.helpers import ROOT
from tools.demo_corpus import read_corpus

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each code cell prints, by the cell's id; run in an empty folder, on the demo model."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LLAMA_JAX_CHECKPOINT", raising=False)
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
        )
        client.execute(env=environment)
    return {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    """Its standard output; on the other there may be a warning, as that kernels are missing."""
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


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


def test_the_same_seed_is_the_same_text(outputs):
    one, again, other = outputs["seeds"].splitlines()
    assert one == again
    assert one.startswith("1 '")
    assert one[2:] != other[2:]
    assert outputs["replay"].endswith("the same tokens: True\n")


def test_a_batch_is_in_order_and_as_if_alone(outputs):
    *answers, comparison = outputs["batch"].splitlines()
    countries = ["Italy", "Japan", "Norway", "Peru", "Spain", "Sweden"]
    assert [country in answer for country, answer in zip(countries, answers, strict=True)] == [
        True
    ] * 6
    assert comparison == "as if alone: True"


def test_logprobs(outputs):
    """The demo is sure of what it learnt, and of nothing else."""
    learnt, unheard = outputs["logprobs"].split("Tell me about the sea.\n")
    sure, unsure = (
        [float(percent) for percent in re.findall(r" (\d+\.\d)% ", part)]
        for part in (learnt, unheard)
    )
    assert min(sure) > 95
    assert min(unsure) < 80
    assert (len(sure), len(unsure)) == (8, 8)


def test_chat(outputs):
    assert "🦙 Nice to meet you, Sam!" in outputs["chat"]
    assert "🦙 Your name is Sam." in outputs["chat"]
    assert "(0 of " in outputs["chat"]


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert NOTEBOOK.read_text("utf-8") == text  # as `json` writes it: a change is a small diff


def test_only_the_installation_is_left_out():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    skipped = [c.id for c in notebook.cells if "skip-execution" in c.metadata.get("tags", [])]
    assert skipped == ["install"]


def test_its_links_lead_somewhere():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = {
        line.lstrip("#").strip().replace(" ", "-")
        for text in texts
        for line in text.splitlines()
        if line.startswith("#")
    }
    for text in texts:
        for link in re.findall(r"\]\(#([^)]*)\)", text):
            assert link in titles
        for path in re.findall(r"`((?:docs|notebooks)/[^`]*|[A-Z]+\.md)`", text):
            assert (ROOT / path).exists(), path
