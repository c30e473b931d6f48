"""Receipts on the command line: written, replayed, swept, continued, compared."""

import json
import re
import shlex

import pytest

from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.receipt import read_receipts
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "reproducibility.md"
STORY = ("--prompt=Tell me a story.", "--temperature=2.5", "--max_tokens=12")


@pytest.fixture
def receipt(cli, tmp_path):
    """A file with the receipt of one run, and its text."""
    path = tmp_path / "receipt.jsonl"
    status, out, _ = cli(*STORY, "--seed=3", f"--receipt={path}")
    assert status == 0
    return path, out


def test_a_receipt_is_replayed_and_appended(cli, receipt):
    path, _ = receipt
    cli(*STORY, "--seed=4", f"--receipt={path}", "--private")
    status, out, err = cli("replay", str(path), "--slots=1", "--noverify")
    assert status == 2
    first, second = out.splitlines()
    assert ": EXACT | 12 draws" in first
    assert ": NOT_REPLAYABLE | 12 draws | the receipt is private" in second
    assert "1 EXACT, 1 NOT_REPLAYABLE" in err


@pytest.mark.slow
def test_the_commands_of_the_page(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    block = block.replace("receipt.jsonl", str(tmp_path / "receipt.jsonl"))
    first, *others = [shlex.split(line) for line in block.splitlines()]
    assert first == ["python", "run.py", "selftest"]  # tests/test_packaging.py runs it
    outputs = []
    for python, program, *arguments in others:
        assert (python, program) == ("python", "run.py")
        status, out, err = cli(*arguments)
        assert status == 0, err
        outputs.append(out)
    assert all(re.search("EXACT|TOKENS", out) for out in outputs[1:3])
    assert "token agreement" in outputs[-1]


@pytest.mark.slow
def test_a_run_with_other_ends_is_replayed_with_them(cli, tmp_path):
    path = tmp_path / "receipt.jsonl"
    arguments = ("--prompt=What is the capital of France?", "--temperature=0", "--eos_tokens=830")
    assert cli(*arguments, f"--receipt={path}")[0] == 0
    status, out, _ = cli("replay", str(path), "--slots=1", "--noverify", "--prefill")
    assert status == 0
    assert ": EXACT | 4 draws" in out


def test_a_divergence_is_exit_1(cli, receipt, tmp_path):
    statement = json.loads(receipt[0].read_text())
    definition = statement["predicate"]["buildDefinition"]
    definition["internalParameters"]["draws"]["token"][2] += 1
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(statement, indent=1))
    status, out, _ = cli("replay", str(path), "--slots=1", "--noverify", "--output=json")
    assert status == 1
    verdict = json.loads(out)["predicate"]
    assert verdict["properties"] == []
    assert verdict["llamaJax"]["judgement"] == "EDITED"


def test_a_run_is_continued_and_forked(cli, receipt):
    path, text = receipt
    assert cli(f"--resume={path}", "--at=5")[:2] == (0, text)
    assert cli(f"--resume={path}", "--at=12")[:2] == (0, text)
    status, fork, _ = cli(f"--resume={path}", "--at=2", "--seed=9")
    assert status == 0
    assert fork != text


def test_a_sweep_is_each_seed_alone(cli, receipt, tmp_path):
    _, text = receipt
    receipts = tmp_path / "sweep.jsonl"
    status, out, _ = cli("sweep", "--seeds=2:5", *STORY, "--slots=1", f"--receipt={receipts}")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["seed"] for row in rows] == [2, 3, 4]
    assert rows[1]["response"] + "\n" == text
    assert [r.parameters.seed for r in read_receipts(receipts)] == [2, 3, 4]


def test_a_batch_has_a_line_of_receipts_for_each_request(cli, tmp_path):
    source, output, receipts = (tmp_path / name for name in ("in", "out", "receipts"))
    source.write_text('{"prompt": "Hello", "max_tokens": 2}\n{"prompt": 5}\n{"prompt": "Hi"}\n')
    arguments = ("batch", f"--input={source}", f"--output={output}", f"--receipt={receipts}")
    assert cli(*arguments, "--slots=1")[0] == 2  # the second line is a mistake
    rows = [json.loads(line) for line in receipts.read_text().splitlines()]
    assert [(row["line"], len(row["receipts"])) for row in rows] == [(1, 1), (2, 0), (3, 1)]
    results = output.read_text().splitlines()
    output.write_text(results[0] + "\n")  # as if it had stopped
    assert cli(*arguments, "--slots=1")[0] == 2
    assert len(receipts.read_text().splitlines()) == 3
    assert len(list(read_receipts(receipts))) == 2


def test_receipts_are_compared(cli, receipt, tmp_path):
    path, _ = receipt
    status, out, _ = cli("compare", str(path), str(path), "--output=json")
    assert status == 0
    assert json.loads(out)["token_agreement"] == 1
    plot = tmp_path / "plot.png"
    pytest.importorskip("matplotlib", reason="needs the dev extra")
    status, out, _ = cli("compare", str(path), str(path), f"--plot={plot}")
    assert status == 0
    assert "token agreement" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_models_are_compared(cli, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "Tell me a story.", "temperature": 2, "max_tokens": 9}\n')
    sides = str(DEMO_CHECKPOINT), f"{DEMO_CHECKPOINT},dtype=bfloat16"
    status, out, _ = cli("compare", *sides, f"--input={requests}", "--output=json")
    assert status == 0
    found = json.loads(out)
    assert found["draws"] == 9
    assert 0 < found["kl_mean"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("replay",), "got the argument 'replay', expected"),
        (("replay", "nothing.jsonl"), "nothing.jsonl: No such file"),
        (("replay", "a", "b"), "expected chat"),
        (("sweep", "--prompt=x"), "--seeds is None"),
        (("sweep", "--prompt=x", "--seeds=5:5"), "--seeds is '5:5'"),
        (("sweep", "--prompt=x", f"--seeds={2**64}"), "2^64 - 1"),
        (("sweep", "--prompt=x", "--seeds=0:2", "--seed=1"), "--seed is given with sweep"),
        (("--prompt=x", "--private"), "--private is given without --receipt"),
        (("--prompt=x", "--at=1"), "--at is given without --resume"),
        (("--prompt=x", "--receipt=/nowhere/x"), "/nowhere/x: No such file"),
        (("compare", "nothing", "nothing"), "nothing does not exist"),
        (("compare", f"{DEMO_CHECKPOINT},x=1", "x"), "expected dtype, devices, determinism"),
        (("compare", str(DEMO_CHECKPOINT), str(DEMO_CHECKPOINT)), "need --input"),
    ],
)
def test_mistakes(mistake, arguments, expected):
    assert expected in mistake(*arguments)
