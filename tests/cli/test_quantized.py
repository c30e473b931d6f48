"""int8 weights are labelled wherever a model is named, and their bytes are counted as they are."""

import json
import re
import socket
import types

import jax
import pytest

from convert.__main__ import main as convert
from llama_jax import Llama
from llama_jax.config import INT8_LABEL
from llama_jax.decode import memory
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.receipt.reading import read_receipts
from llama_jax.replay.replay import replay
from llama_jax.replay.verdict import Outcome
from llama_jax.server.serve import _ready_line
from llama_jax.server.settings import Settings
from tests.helpers.demo import load_demo
from tests.helpers.serving import MODEL, serving

PROMPT = {"prompt": "What is the capital of France?", "seed": 3, "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "demo-int8"
    assert convert(["quantize", str(DEMO_CHECKPOINT), str(path), "--text=none"]) == 0
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return Llama.load(folder)


def test_results_and_scores_say_it(llm):
    result = llm.generate(**PROMPT)
    assert result.to_dict()["quantization"] == INT8_LABEL
    assert llm.score("Hello there, how are you?").quantization == INT8_LABEL
    plain = load_demo()
    assert plain.generate(**PROMPT).to_dict()["quantization"] is None
    assert plain.engine.fingerprint != result.fingerprint
    assert "quantization" not in plain.engine.environment.parts["config"]


def test_a_receipt_says_it_and_is_replayed(cli, folder, llm, tmp_path):
    receipt = llm.generate(**PROMPT).receipt()
    definition = receipt["predicate"]["buildDefinition"]
    [weights] = [d for d in definition["resolvedDependencies"] if d["name"] == "weights"]
    assert weights["annotations"]["quantization"] == INT8_LABEL
    environment = definition["internalParameters"]["environment"]
    assert environment["config"]["quantization"] == "int8"
    path = tmp_path / "receipt.jsonl"
    path.write_text(json.dumps(receipt) + "\n")
    status, out, _ = cli("replay", str(path), f"--checkpoint={folder}")
    assert status == 0
    assert Outcome.EXACT.name in out
    status, out, _ = cli("replay", str(path), f"--checkpoint={DEMO_CHECKPOINT}")
    assert status != 0
    assert "weights (the checkpoint's root)" in out


def test_the_command_lines_lines_say_it(cli, folder):
    run = (f"--checkpoint={folder}", "--prompt=Hello", "--max_tokens=2")
    assert f"| float32, weights {INT8_LABEL} | seed " in cli(*run)[2]
    _, out, _ = cli(*run, "--output=json")
    assert json.loads(out)["quantization"] == INT8_LABEL
    _, _, err = cli("score", f"--checkpoint={folder}", "--prompt=Hello there")
    assert f"| float32, weights {INT8_LABEL} | fp_" in err


def test_an_estimate_counts_its_bytes(cli, folder, llm, monkeypatch):
    monkeypatch.setattr("llama_jax.cli.estimate.most_slots", lambda *_: 1)  # takes seconds
    status, out, _ = cli("--estimate", f"--checkpoint={folder}")
    assert status == 0
    held = sum(array.nbytes for array in jax.tree.leaves(llm.executor.params))
    row = out.splitlines()[0]
    assert row == f"weights  {memory.in_units(held):>10}  demo-int8, float32, weights {INT8_LABEL}"
    whole = sum(array.nbytes for array in jax.tree.leaves(load_demo().executor.params))
    assert held < whole / 2


def test_loading_much_says_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_MUCH", 10**6)
    Llama.load(folder, progress=True)
    assert (
        f"the model needs 5.02 MB ({INT8_LABEL}): 1.86 MB of weights, " in capsys.readouterr().err
    )


def test_a_server_says_it(llm):
    with serving(llm) as client:
        [entry] = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["dtype"], entry["quantization"]) == (MODEL, "float32", INT8_LABEL)
    service = types.SimpleNamespace(llm=llm, settings=Settings())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = _ready_line(service, listener)
    assert re.match(rf"serving {MODEL}: demo-int8, float32, weights {INT8_LABEL}, 1 slots, ", line)


@pytest.mark.parametrize("prefill", [False, True])
def test_its_draws_are_those_of_one_pass(llm, tmp_path, native_kernels, prefill):
    path = tmp_path / "receipt.jsonl"
    path.write_text(json.dumps(llm.generate(**PROMPT | {"temperature": 1.5}).receipt()) + "\n")
    [verdict] = replay(llm, read_receipts(path), prefill=prefill)
    assert verdict.outcome is Outcome.EXACT
