"""The benchmark: its arithmetic, its command line, and that it runs. Never how fast."""

import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from benchmarks import __main__ as program
from benchmarks import ablate, bits, command
from benchmarks.cases import Case, Engine, contexts, make_plan, parse_peer
from benchmarks.limits import Limits, median
from benchmarks.model_cost import (
    ITEM_BYTES,
    bytes_read,
    decode_cost,
    kv_bytes,
    params_read,
    prefill_cost,
    total_params,
    weight_bytes,
)
from benchmarks.report import table
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.weights import make_weights
from llama_jax.decode.plan import choose_plan
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError
from llama_jax.nn import sharding
from llama_jax.nn.cache import init_cache
from llama_jax.nn.sharding import AXES, Shards, specs
from llama_jax.nn.transformer import param_shapes
from tests.helpers import ROOT

SMALL = ["--shape=demo", "--dtype=float32", "--batch=1", "--prompt_len=16", "--context=32"]
SMALL += ["--new_tokens=8", "--rounds=1", "--name=small"]


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[pytest.mark.slow] * s.endswith("b")) for s in SHAPES]
)
def test_parameters_are_the_models(shape):
    config = load_shape(shape)
    params = param_shapes(config)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total_params(config) == total
    assert params_read(config) == total - params["embed"].size


@pytest.mark.parametrize("change", [{}, {"vocab_size": 32001}, {"tie_embeddings": True}])
@pytest.mark.parametrize(("kv", "group"), [(1, 1), (4, 1), (4, 2)])
def test_a_devices_parameters_are_its_parts(kv, group, change):
    """A layer of the 1B shape, whose four key/value heads eight devices share by two."""
    config = dataclasses.replace(load_shape("1b"), num_layers=1, **change)
    shards, mesh = Shards(kv, group), AbstractMesh((kv, group), AXES)

    def numbers(tree):
        """Return how many numbers of each array a device has."""
        return jax.tree.map(
            lambda array, spec: math.prod(NamedSharding(mesh, spec).shard_shape(array.shape)),
            tree,
            specs(tree, config, shards),
        )

    params = numbers(param_shapes(config))
    unread = 0 if config.tie_embeddings else params["embed"]
    assert params_read(config, shards) == sum(jax.tree.leaves(params)) - unread
    cache = numbers(jax.eval_shape(lambda: init_cache(config, 1, 1, "float16")))
    assert kv_bytes(config, "float16", shards) == 2 * sum(jax.tree.leaves(cache))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_quantized_models_bytes_are_its_arrays(dtype, parts):
    config = dataclasses.replace(load_shape("demo"), quantization="int8")
    shards = Shards(parts)
    held = sharding.weight_bytes(config, dtype, shards)
    table = config.vocab_size * config.dim * ITEM_BYTES[dtype]
    assert bytes_read(config, dtype, shards) == held - table // parts
    if parts == 1:
        leaves = jax.tree.leaves(param_shapes(config, dtype))
        assert weight_bytes(config, dtype) == held
        assert held == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        assert weight_bytes(config, dtype) < weight_bytes(load_shape("demo"), dtype)


def test_made_up_int8_weights_keep_the_size_of_activations():
    config = dataclasses.replace(load_shape("demo"), quantization="int8")
    layer = make_weights(config, "float16", None).params["layer_0"]["feed_forward"]
    for name in ("gate", "down"):
        assert (layer[name].dtype, layer[f"{name}_scale"].dtype) == (jnp.int8, jnp.float32)
        wide = layer[name].astype(jnp.float32) * layer[f"{name}_scale"][:, None]
        assert float(jnp.square(wide).sum(axis=1).mean()) == pytest.approx(1, rel=0.03)


def test_a_token_of_7b_reads_13_gigabytes():
    config = load_shape("7b")
    assert params_read(config) * 2 == 13_214_687_232
    assert kv_bytes(config, "float16") == 524_288
    step = decode_cost(config, "bfloat16", batch=1, context=0, new_tokens=1)
    assert step.bytes == 13_214_687_232 + 524_288
    assert step.flops == 2 * params_read(config) + 4 * 32 * 4096
    batch = decode_cost(config, "bfloat16", batch=8, context=1000, new_tokens=1)
    assert batch.bytes == 13_214_687_232 + 8 * 1001 * 524_288
    assert batch.flops == 8 * (2 * params_read(config) + 1001 * 4 * 32 * 4096)


def test_the_costs_of_steps_add_up():
    config = load_shape("1b")
    steps = [
        decode_cost(config, "float32", batch=3, context=c, new_tokens=1) for c in range(100, 108)
    ]
    run = decode_cost(config, "float32", batch=3, context=100, new_tokens=8)
    assert run.bytes == sum(step.bytes for step in steps)
    assert run.flops == sum(step.flops for step in steps)


@pytest.mark.parametrize(("tokens", "tflop"), [(128, 1.66), (512, 6.70), (2048, 27.6)])
def test_the_cost_of_a_prefill_of_7b(tokens, tflop):
    cost = prefill_cost(load_shape("7b"), "float16", tokens=tokens)
    assert cost.flops / 1e12 == pytest.approx(tflop, rel=5e-3)
    assert cost.limit_seconds(1e15, 1e12) == pytest.approx(cost.flops / 1e12)
    assert cost.limit_seconds(1e9, 1e18) == pytest.approx(cost.bytes / 1e9)


def test_cases_that_do_not_fit_are_skipped_with_a_reason():
    config = load_shape("7b")
    ours, cpp = Engine("ours", "float16"), Engine("llamacpp", "float16")
    cases = [Case("decode", 4090, 1, 32), Case("decode", 4000, 32, 32), Case("decode", 128, 2, 32)]
    cases.append(Case("prefill", 128))
    plan, skipped = make_plan(config, [ours, cpp], cases, memory=40 * 10**9)
    assert plan == {ours: cases[2:], cpp: cases[3:]}
    reasons = {(skip["engine"], skip["case"]): skip["reason"] for skip in skipped}
    assert reasons[str(ours), str(cases[0])] == "needs 4,122 positions, of 4,096"
    assert reasons[str(ours), str(cases[1])] == "needs 96.7 GB with all engines, 40.0 are free"
    assert reasons[str(cpp), str(cases[2])] == "measured at batch 1 only"
    assert contexts(plan[ours]) == {1: 129, 2: 160}


def test_a_record_holds_no_path_of_its_machine():
    shown = command.command_line("benchmarks", ["--folder=/home/me/v/x", "--output=here/it"])
    assert shown == "python -m benchmarks --folder=x --output=here/it"
    for record in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r"""["'= ]/\w""", record.read_text("utf-8")), record


def test_every_record_can_be_plotted():
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    from benchmarks.plot import draw

    no_cases = "batch-interference checkpoints gpu-h100-strict ray-workers speculation trace"
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if not path.name.startswith(tuple(no_cases.split())):
            assert draw(json.loads(path.read_text("utf-8"))).axes, path


def test_limits_are_medians():
    samples = [
        Limits("cpu", "cpu", None, bandwidth, {"float32": rate})
        for bandwidth, rate in ((1.0, 4.0), (9.0, 3.0), (2.0, 2.0))
    ]
    assert median(samples) == Limits("cpu", "cpu", None, 2.0, {"float32": 3.0})


def test_a_table_aligns_names_left_and_numbers_right():
    text = table([{"name": "x", "n": 1000}, {"name": "yy", "n": 0.1234, "of": None}])
    assert text == "name      n  of\nx     1,000\nyy    0.123"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape=8b"], "--shape has '8b', expected 13b, 1b, 300m, 70b, 7b, demo"),
        (["--shape=1b", "--checkpoint=x"], "--shape is given with --checkpoint"),
        (["--checkpoint=none"], "--checkpoint=none has no config.json; name the folder"),
        (["--dtype=int8"], "--dtype has 'int8', expected float32, float16, bfloat16"),
        (["--dtype="], "--dtype is empty"),
        (["--weights=int4"], "--weights has 'int4', expected full, int8"),
        (["--weights="], "--weights is empty, expected full, int8 or both"),
        ([f"--checkpoint={DEMO_CHECKPOINT}", "--weights=int8"], "--weights is given with --chec"),
        (["--batch=0"], "--batch has '0', expected whole numbers from 1 on"),
        (["--prompt_len=", "--batch="], "nothing to do"),
        (["--new_tokens=0"], "flag --new_tokens=0: "),
        (["--against=vllm"], "--against has 'vllm', expected hf, hf-compile, llamacpp"),
        (["--name=a/b"], "--name is 'a/b', expected letters, digits, dots and hyphens"),
        (["--name=a", "--output=run.py"], "--output=run.py: File exists; name a folder"),
        (["--unknown"], "Unknown command line flag 'unknown'; see --help"),
        (["fast"], "got the argument 'fast', expected flags only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(cli, arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, out, err = cli(program, *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_an_entry_of_against_names_dtype_and_weights(monkeypatch):
    monkeypatch.setattr(command, "check_modules", lambda what, modules: None)
    assert parse_peer("hf", "float16") == Engine("hf", "float16")
    assert parse_peer("hf:bfloat16", "float16") == Engine("hf", "bfloat16")
    int8 = parse_peer("llamacpp:float16:int8", "float32")
    assert (str(int8), int8.weights) == ("llamacpp:float16:int8", "int8")
    for text, expected in (
        ("hf:int8", "--against=hf has 'int8', expected float32, float16, bfloat16"),
        ("hf:float16:int8", "--against=hf:float16 has 'int8', expected full"),
        ("llamacpp:float16:int4", "--against=llamacpp:float16 has 'int4', expected full, int8"),
    ):
        with pytest.raises(InputError, match=re.escape(expected)):
            parse_peer(text, "float16")


def check_rows(record):
    """Every figure of a row follows from its rounds."""
    for row in record["cases"]:
        assert row["seconds"] == statistics.median(row["rounds_s"])
        counted = row["tokens"] if row["op"] == "prefill" else row["batch"] * row["new_tokens"]
        assert row["tokens_per_s"] == counted / row["seconds"]
        share = row["tokens_per_s"] / row["limit_tokens_per_s"]
        assert row["fraction_of_limit"] == pytest.approx(share)


@pytest.mark.exhaustive
def test_end_to_end(tmp_path):
    done = run("benchmarks", *SMALL, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_rows(record)
    assert [row["op"] for row in record["cases"]] == ["prefill", "decode"]
    assert record["failures"] == record["skipped"] == []
    assert record["weights"] == "checkpoint"
    engine = record["engines"]["ours:float32"]
    figures = ("load_s", "compile_cold_s", "compile_warm_s", "process_bytes", "programs")
    assert all(engine[figure] > 0 for figure in figures)
    assert record["streaming"]["ours:float32"]["stream_over_whole"] > 0
    assert "ours:float32" in done.stdout


@pytest.mark.exhaustive
def test_int8_against_float16(tmp_path):
    flags = ("--weights=full,int8", "--dtype=float16", "--nowarm_start", f"--output={tmp_path}")
    done = run("benchmarks", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_rows(record)
    rows = {(row["op"], row["engine"]): row for row in record["cases"]}
    for op in ("prefill", "decode"):
        whole, int8 = rows[op, "ours:float16"], rows[op, "ours:float16:int8"]
        ratio = whole["rounds_s"][0] / int8["rounds_s"][0]
        assert whole["ours_over_this"] == {"ours:float16:int8": ratio}
        assert int8["ours_over_this"] == {}
        assert int8["limit_tokens_per_s"] >= whole["limit_tokens_per_s"]
    engines = record["engines"]
    whole, int8 = (engines[f"ours:float16{end}"]["weights_bytes"] for end in ("", ":int8"))
    assert int8 < whole


def against(peer, tmp_path):
    """Measure with one peer; its ratios are those of the rounds."""
    done = run("benchmarks", *SMALL, f"--against={peer}", "--nowarm_start", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_rows(record)
    theirs = [row for row in record["cases"] if row["engine"] == peer]
    assert [row["op"] for row in theirs] == ["prefill", "decode"]
    for row in theirs:
        (ours,) = (r for r in record["cases"] if r["op"] == row["op"] and r is not row)
        ratio = row["rounds_s"][0] / ours["rounds_s"][0]
        assert row["ours_over_this"] == {"ours:float32": ratio}


@pytest.mark.exhaustive
@pytest.mark.parity
def test_against_hugging_face(tmp_path):
    against("hf:float32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["llamacpp:float32", "llamacpp:float32:int8"])
def test_against_llamacpp(peer, tmp_path):
    pytest.importorskip("gguf", reason="needs the bench extra")
    pytest.importorskip("llama_cpp", reason="needs the bench extra, built from source")
    against(peer, tmp_path)


@pytest.mark.parametrize("choice", ablate.CHOICES)
def test_the_ways_of_a_choice_differ_and_begin_with_the_plan(choice):
    config = load_shape("demo")
    plan = choose_plan(config, "bfloat16")
    plans = ablate.make_plans(choice, config, "bfloat16")
    assert next(iter(plans.items())) == ("the plan", plan)
    assert len(set(plans.values())) == len(plans)
    # The kernels' only plan is strict.
    alone = {"hlo", "plan"} | ({"determinism"} if plan.batch_invariant else set())
    assert (len(plans) > 1) == (choice not in alone)


def test_other_bits_and_other_tokens_are_counted_apart():
    same, tie, other = ([5, 6], [[1], [2]]), ([5, 6], [[1], [3]]), ([7, 6], [[0], [2]])
    assert bits.compare("x", [same, tie, other], [same] * 3) == {
        "changed": "x",
        "requests": 3,
        "other bits": 2,
        "other tokens": 1,
        "first at": 0,
    }
    assert bits.compare("x", [same], [same])["first at"] is None


def test_operations_of_a_program_are_counted():
    compiled = jax.jit(lambda x: jnp.sort(x.T)).lower(jnp.ones((8, 4))).compile()
    counts = ablate.count_operations(compiled)
    assert counts["operations"]["sort"] == 1
    assert counts["bytes"]["argument"] == 8 * 4 * 4


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs bash and coreutils' timeout")
def test_the_script_for_gpus(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        env={**os.environ, "SMALL": "1", "STEPS": "one strict ablate wrong", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    one, *strict, ablated, wrong = done.stdout.splitlines()
    assert one.startswith("one: status 0, ")
    assert [line[:20] for line in strict] == ["strict-1: status 0, ", "strict-8: status 0, "]
    assert ablated.startswith("ablate: status 0, ")
    assert wrong == "wrong: no such step"
    for name in ("e2e-one.json", "ablate.json", "one.log", "summary.txt"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.slow
def test_checkpoints_are_measured_at_every_step(tmp_path):
    folders = (f"--folder={tmp_path}", f"--output={tmp_path / 'out'}", "--name=it")
    done = run("benchmarks.checkpoints", "--shape=demo", "--dtype=float32,float16", *folders)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what was made is removed
    text = (tmp_path / "out" / "it.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    steps = ["import alone", "convert", "verify", "load, one token", "export"]
    assert list(record["steps"]) == steps
    assert record["source_bytes"] == 2 * record["stored_bytes"]
    assert all(step["peak_bytes"] > 2**26 for step in record["steps"].values())
