"""The notebooks run from the first cell to the last, and say what they should.

The quickstart is in test_quickstart.py.
"""

import ast
import inspect
import re

import nbformat
import pytest

from llama_jax import Llama
from tests.helpers import ROOT
from tests.helpers.notebooks import NOTEBOOKS, QUICKSTART, RECEIPTS, TPU, printed
from tools.demo_corpus import read_corpus
from tools.run_notebook import dump, execute

pytestmark = pytest.mark.slow

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_other = pytest.mark.parametrize("path", [RECEIPTS, TPU], ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def receipts_outputs(tmp_path_factory):
    """What the notebook of receipts prints."""
    return outputs_of(RECEIPTS, tmp_path_factory.mktemp("receipts"))


@pytest.fixture(scope="module")
def tpu_outputs(tmp_path_factory):
    """What the notebook for a TPU prints on eight simulated devices."""
    flags = "--xla_force_host_platform_device_count=8"
    return outputs_of(TPU, tmp_path_factory.mktemp("tpu"), XLA_FLAGS=flags)


def outputs_of(path, folder, **variables):
    """Run a notebook in an empty folder, on the demo model; return what each cell prints."""
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, folder, **variables)
    return printed(notebook)


def test_a_receipt_is_replayed_on_another_machine(receipts_outputs):
    outcomes = receipts_outputs["replay"].split()
    assert len(outcomes) == 2
    is_batch_invariant = "batch" in receipts_outputs["receipt"].split()
    assert set(outcomes) <= ({"EXACT"} if is_batch_invariant else {"EXACT", "TOKENS"})


def test_what_is_not_the_run_is_found(receipts_outputs):
    verdict, *reasons = receipts_outputs["edit"].splitlines()
    assert verdict == "DIVERGED | edited: the receipt is not what a run wrote"
    assert len(reasons) == 2
    assert receipts_outputs["other"].startswith("NOT_REPLAYABLE | dtype: ")


def test_a_run_is_continued_by_its_seed_and_by_another(receipts_outputs):
    own, text, fork, _ = receipts_outputs["resume"].splitlines()
    assert text + "\n" == receipts_outputs["run"]
    counts = [int(re.fullmatch(r"\d+ (\d+) tokens are the same", line)[1]) for line in (own, fork)]
    assert counts[0] > counts[1] >= 10


def test_a_signed_receipt_is_verified(receipts_outputs):
    signed, error = receipts_outputs["sign"].splitlines()
    assert signed == "signed by this key: True"
    assert error.startswith("receipt.json: not signed, expected key ")


def test_a_number_of_devices_that_does_not_divide_is_refused_with_those_that_do(tpu_outputs):
    assert len(tpu_outputs["devices"].splitlines()) == 8
    error, config = tpu_outputs["load"].splitlines()
    assert error.startswith("the model cannot be split over 8 devices: it has 2 key/value heads")
    assert error.endswith("choose 1, 2, 4")
    assert config.startswith("ModelConfig(")


def test_each_device_holds_its_part(tpu_outputs):
    """Two parts of the key/value heads, each on two devices; four parts of all else."""
    axes, devices = map(ast.literal_eval, tpu_outputs["mesh"].splitlines())
    assert (axes, len(set(devices))) == ({"data": 1, "kv": 2, "group": 2}, 4)
    rows = [
        re.fullmatch(r"(.*\S) +(\(.*\)) +(\(.*\)) +(\d)", line)
        for line in tpu_outputs["shards"].splitlines()[1:]
    ]
    found = {row[1]: tuple(ast.literal_eval(row[i]) for i in (2, 3, 4)) for row in rows}
    assert found == {
        "embed": ((1024, 128), (1024, 32), 1),
        "attention q": ((128, 128), (32, 128), 1),
        "attention k": ((64, 128), (32, 128), 2),
        "attention o": ((128, 128), (32, 128), 1),
        "feed_forward up": ((384, 128), (96, 128), 1),
        "ffn_norm": ((128,), (128,), 4),
        "cache k": ((4, 2, 512, 32), (4, 1, 512, 32), 2),
        "cache v": ((4, 2, 512, 32), (4, 1, 512, 32), 2),
    }


def test_a_split_model_generates_the_tokens_of_one_device(tpu_outputs):
    tale, ending = tpu_outputs["generate"].splitlines()
    assert any(known.startswith(tale) for known in read_corpus().tales)
    assert ending.startswith("7 length Usage(prompt_tokens=15, completion_tokens=100,")
    lines = tpu_outputs["same"].splitlines()
    assert lines[1::2] == ["the same tokens: True"] * 4
    assert lines[0] == f"seed 7: {tale!r}"
    assert len({line.partition(":")[2] for line in lines[::2]}) == 4


def test_slots_on_several_devices_answer_as_one_device_alone(tpu_outputs):
    *answers, comparison = tpu_outputs["slots"].splitlines()
    capitals = ["Rome", "Tokyo", "Oslo", "Lima", "Madrid", "Stockholm"]
    assert [answer.endswith(f" is {c}.") for answer, c in zip(answers, capitals, strict=True)] == [
        True
    ] * 6
    assert comparison == "as alone on one device: True"


def test_timings(tpu_outputs):
    """The request was answered before: nothing is compiled for it."""
    timings = {
        name: float(value.replace(",", ""))
        for name, value in map(str.split, tpu_outputs["timings"].splitlines())
    }
    assert timings["compile_s"] == 0
    assert min(timings[name] for name in ("load_s", "prefill_s", "decode_s")) > 0
    assert timings["decode_tokens_per_s"] > 0


def test_the_call_for_llama_2_7b_names_parameters_that_there_are():
    """It is not run: it downloads 13.5 GB."""
    (text,) = (c.source for c in nbformat.read(TPU, as_version=4).cells if c.id == "llama-2-7b")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (call,) = (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call))
    assert ast.unparse(call.func) == "Llama.load"
    arguments = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    inspect.signature(Llama.load).bind(ast.literal_eval(call.args[0]), **arguments)


@each_other
def test_it_is_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@each_notebook
def test_its_file_is_as_json_writes_it(path):
    """So that a change is a small diff."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.read_text("utf-8") == dump(notebook)


@each_notebook
def test_only_the_installation_is_left_out(path):
    """The quickstart's is run, and is the same."""
    notebook = nbformat.read(path, as_version=4)
    skipped = [c.id for c in notebook.cells if "skip-execution" in c.metadata.get("tags", [])]
    assert skipped == ([] if path == QUICKSTART else ["install"])
    (install,) = (cell.source for cell in notebook.cells if cell.id == "install")
    assert re.search(r"^%pip install --quiet -e [\"']\.\[[^ ]*\][\"']$", install, re.MULTILINE)


@each_notebook
def test_its_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
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
        for named in re.findall(r"`((?:docs|notebooks)/[^`]*|[A-Z]+\.md)`", text):
            assert (ROOT / named).exists(), named
