"""The benchmark: its arithmetic, its command line, and that it runs. Never how fast."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys

import pytest
from absl.testing import flagsaver

from benchmarks import __main__ as program
from benchmarks.cases import Case, Engine, make_plan
from benchmarks.choices.compiled import count_operations
from benchmarks.command import command_line
from benchmarks.limits import Limits, median
from benchmarks.model_cost import decode_cost, kv_bytes, params_read, prefill_cost, total_params
from benchmarks.report import table
from benchmarks.shapes import SHAPES, load_shape
from llama_jax.nn.transformer import param_shapes
from tests.helpers import ROOT

SMALL = ["--shape=demo", "--dtype=float32", "--batch=1", "--prompt_len=16", "--context=32"]
SMALL += ["--new_tokens=8", "--rounds=1", "--name=small"]


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def cli(capsys):
    """Run main() on flags; return (exit status, stdout, stderr)."""

    def call(*arguments):
        saved = flagsaver.save_flag_values(program.FLAGS)
        try:
            with pytest.raises(SystemExit) as exit_:
                program.main(["benchmarks", *arguments])
        finally:
            flagsaver.restore_flag_values(saved, program.FLAGS)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_the_models(shape):
    import jax

    config = load_shape(shape)
    params = param_shapes(config)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total_params(config) == total
    assert params_read(config) == total - params["embed"].size


def test_a_token_of_7b_reads_13_gigabytes():
    config = load_shape("7b")
    assert params_read(config) * 2 == 13_214_687_232
    assert kv_bytes(config, "float16") == 524_288
    step = decode_cost(config, "bfloat16", batch=1, context=0, new_tokens=1)
    assert step.bytes == 13_214_687_232 + 524_288
    assert step.flops == 2 * params_read(config) + 4 * 32 * 4096
    rows = decode_cost(config, "bfloat16", batch=8, context=1000, new_tokens=1)
    assert rows.bytes == 13_214_687_232 + 8 * 1001 * 524_288
    assert rows.flops == 8 * (2 * params_read(config) + 1001 * 4 * 32 * 4096)


def test_steps_add_up():
    config = load_shape("1b")
    steps = [
        decode_cost(config, "float32", batch=3, context=c, new_tokens=1) for c in range(100, 108)
    ]
    run = decode_cost(config, "float32", batch=3, context=100, new_tokens=8)
    assert run.bytes == sum(step.bytes for step in steps)
    assert run.flops == sum(step.flops for step in steps)


@pytest.mark.parametrize(("tokens", "tflop"), [(128, 1.66), (512, 6.70), (2048, 27.6)])
def test_prefill_of_7b(tokens, tflop):
    cost = prefill_cost(load_shape("7b"), "float16", tokens=tokens)
    assert cost.flops / 1e12 == pytest.approx(tflop, rel=5e-3)
    assert cost.limit_seconds(1e15, 1e12) == pytest.approx(cost.flops / 1e12)
    assert cost.limit_seconds(1e9, 1e18) == pytest.approx(cost.bytes / 1e9)


def test_what_does_not_fit_is_named():
    config = load_shape("7b")
    ours, cpp = Engine("ours", "float16"), Engine("llamacpp", "float16")
    cases = [Case("decode", 4090, 1, 32), Case("decode", 4000, 32, 32), Case("decode", 128, 2, 32)]
    cases.append(Case("prefill", 128))
    plan = make_plan(config, [ours, cpp], cases, memory=20 * 10**9)
    assert plan.cases == {ours: tuple(cases[2:]), cpp: tuple(cases[3:])}
    assert not plan.together
    reasons = {(skip.engine, skip.case): skip.reason for skip in plan.skipped}
    assert reasons[ours, cases[0]] == "needs 4,122 positions, the shape has 4,096"
    assert reasons[ours, cases[1]] == "needs 82.2 GB of memory, 20.0 GB are free"
    assert reasons[cpp, cases[2]] == "measured at batch 1 only"
    assert plan.contexts(ours) == {1: 129, 2: 160}
    assert make_plan(config, [ours, cpp], cases, memory=None).together


def test_a_record_holds_no_path_of_its_machine():
    shown = command_line("benchmarks", ["--flax_python=/home/me/v/bin/python", "--output=here/it"])
    assert shown == "python -m benchmarks --flax_python=python --output=here/it"
    for record in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r"""["'= ]/\w""", record.read_text("utf-8")), record


def test_limits_are_medians():
    samples = [
        Limits("cpu", "cpu", None, bandwidth, {"float32": rate})
        for bandwidth, rate in ((1.0, 4.0), (9.0, 3.0), (2.0, 2.0))
    ]
    assert median(samples) == Limits("cpu", "cpu", None, 2.0, {"float32": 3.0})


def test_table():
    text = table(["a", "name", "n"], [["1", "x", "10"], ["1", "yy", "9"]], left=(1,), group=1)
    assert text == "a  name   n\n\n1  x     10\n   yy     9"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape=8b"], "--shape is '8b', expected one of 13b, 1b, 300m, 7b, demo"),
        (["--shape=1b", "--checkpoint=x"], "--shape is given with --checkpoint"),
        (["--checkpoint=none"], "--checkpoint=none has no config.json; name the folder"),
        (["--dtype=int8"], "--dtype has the dtype 'int8', expected float32, float16, bfloat16"),
        (["--dtype="], "--dtype is empty"),
        (["--batch=0"], "--batch has '0', expected whole numbers from 1 on"),
        (["--context=a"], "--context has 'a', expected whole numbers"),
        (["--prompt_len=", "--batch="], "nothing to do"),
        (["--new_tokens=0"], "--new_tokens is 0 and --rounds 3, expected 1 or more"),
        (["--against=vllm"], "--against names 'vllm', expected hf, hf-compile, llamacpp, flax"),
        (["--against=flax"], "--against=flax needs --flax_python"),
        (["--against=flax", "--flax_python=none"], "--flax_python=none is no program"),
        (["--name=a/b"], "--name is 'a/b', expected letters, digits, dots and hyphens"),
        (["--name=a", "--output=run.py"], "--output=run.py: File exists; name a folder"),
        (["--unknown"], "Unknown command line flag 'unknown'; see --help"),
        (["--rounds=x"], "flag --rounds=x"),
        (["fast"], "got the argument 'fast', expected flags only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(cli, arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is not None,
    reason="tells of its absence, and it is installed",
)
def test_a_missing_package_is_named(cli):
    status, _, err = cli("--against=llamacpp")
    assert status == 2
    assert "llama_cpp" in err
    assert "pip install -e '.[bench]'" in err


def check_rows(results):
    """Every figure of a row follows from its rounds."""
    for row in results["cases"]:
        assert row["seconds"] == statistics.median(row["rounds_s"])
        assert row["tokens_per_s"] == row["counted_tokens"] / row["seconds"]
        assert row["fraction_of_limit"] == row["limit_s"] / row["seconds"]
        assert row["flop_per_s"] == row["flops"] / row["seconds"]


@pytest.mark.slow
def test_end_to_end(tmp_path):
    done = benchmark(*SMALL, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_rows(results)
    assert [(row["op"], row["counted_tokens"]) for row in results["cases"]] == [
        ("prefill", 16),
        ("decode", 8),
    ]
    assert results["failures"] == results["skipped"] == []
    assert results["command"].startswith("python -m benchmarks --shape=demo")
    assert results["weights"] == "checkpoint"
    assert results["machine"]["cores"] >= 1
    assert results["limits"]["bandwidth"] > 0
    engine = results["engines"]["ours:float32"]
    for figure in ("load_s", "compile_cold_s", "compile_warm_s", "process_bytes"):
        assert engine[figure] > 0
    assert any("decode" in name for name in engine["programs"])
    assert results["streaming"]["ours:float32"]["stream_over_whole"] > 0
    assert "ours:float32" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot: matplotlib is not installed" in done.stderr
    else:
        assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_interrupted_run_reports_what_it_has(tmp_path, limits_file):
    # A shell that runs these tests in the background has its children ignore SIGINT.
    listen = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", listen, *SMALL, "--rounds=100000", "--nowarm_start"]
    command += [f"--limits={limits_file}", f"--output={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stderr
        told = b""
        while not re.search(rb"prefill 16: .* \d\d+/\d+ ", told):  # ten runs are done
            told += run.stderr.read1()
            assert run.poll() is None, told
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert b"stopped before the end: the rest was not measured" in out
    results = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_rows(results)
    assert [row["op"] for row in results["cases"]] == ["prefill"]


def against(peer, tmp_path):
    """Measure with one peer; return the results."""
    done = benchmark(*SMALL, f"--against={peer}", "--nowarm_start", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_rows(results)
    theirs = [row for row in results["cases"] if row["engine"] == f"{peer}:float32"]
    assert [row["op"] for row in theirs] == ["prefill", "decode"]
    for row in theirs:
        (ours,) = (r for r in results["cases"] if r["op"] == row["op"] and r is not row)
        ratio = row["rounds_s"][0] / ours["rounds_s"][0]
        assert row["ours_over_this"] == {"ours:float32": ratio}


@pytest.mark.slow
@pytest.mark.parity
def test_hugging_face(tmp_path):
    against("hf", tmp_path)


def test_llamacpp(tmp_path):
    pytest.importorskip("gguf", reason="needs the bench extra")
    pytest.importorskip("llama_cpp", reason="needs the bench extra, built from source")
    against("llamacpp", tmp_path)


def sweep(*arguments, code="from benchmarks import sweep"):
    """Run a sweep in a process of its own, on the CPU, after some code."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; sweep.main(sys.argv)", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def limits_file(tmp_path_factory):
    """Limits of no machine: what is tested does not depend on them."""
    path = tmp_path_factory.mktemp("limits") / "limits.json"
    rates = {"float32": 1e11, "float16": 1e11, "bfloat16": 1e11}
    path.write_text(json.dumps(dataclasses.asdict(Limits("cpu", "cpu", None, 1e10, rates))))
    return path


CHOICES = ["steps", "attention", "prefill", "fused", "projection", "sampling", "hlo", "flags"]


@pytest.mark.slow
def test_every_choice_is_swept(tmp_path, limits_file):
    arguments = ["--shape=demo", "--size=small", "--dtype=bfloat16", "--name=small"]
    arguments += ["--xla_flags=--xla_cpu_enable_fast_math=false", "--xla_flags=--xla_unknown"]
    done = sweep(*arguments, f"--limits={limits_file}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sweep-small.json").read_text("utf-8"))
    assert list(results["choices"]) == CHOICES
    assert results["left_out"] == []
    assert results["machine"]["cores"] >= 1
    assert results["plans"]["bfloat16"]["decode_steps"] >= 1
    for choice in results["choices"].values():
        fields = {frozenset(row) for row in choice["rows"]}
        assert len(fields) == 1
        for row in choice["rows"]:
            outcomes = [row[name] for name in ("seconds", "amounts", "skipped", "failed")]
            assert sum(outcome is not None for outcome in outcomes) == 1, row
            if row["seconds"] and row["limit_s"]:
                assert row["fraction_of_limit"] == row["limit_s"] / row["seconds"]
                assert row["bytes_per_s"] == row["bytes"] / row["seconds"]
            if row["best"]:
                rivals = [r["seconds"] for r in choice["rows"] if r["case"] == row["case"]]
                assert row["seconds"] == min(s for s in rivals if s is not None)
    flag, unknown = results["choices"]["flags"]["rows"]
    assert flag["tokens_per_s"] == flag["tokens"] / flag["seconds"]
    assert "Unknown flag" in unknown["skipped"]
    (counted,) = results["choices"]["hlo"]["rows"]
    assert counted["amounts"]["while"] >= 1
    assert counted["amounts"]["alias_bytes"] > 0
    summary = (tmp_path / "compiled-small-bfloat16.txt").read_text("utf-8")
    assert "all operations outside fusions" in summary
    for choice in CHOICES:
        assert f"\n{choice}, " in f"\n{done.stdout}"


def test_only_names_choices():
    done = sweep("--only=projection,speed")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --only names 'speed', expected {', '.join(CHOICES)}\n"


@pytest.mark.slow
def test_a_choice_that_fails_is_reported(tmp_path, limits_file):
    code = """from benchmarks import sweep
def broken(setting):
    raise ValueError("it broke")
sweep.CHOICES["fused"] = broken"""
    arguments = ["--shape=demo", "--size=small", "--dtype=float32", "--only=fused,hlo,flags"]
    done = sweep(
        *arguments,
        f"--limits={limits_file}",
        f"--output={tmp_path}",
        "--name=broken",
        code=f"exec({code!r}, globals())",
    )
    assert done.returncode == 1
    assert "failed: ValueError: it broke" in done.stdout
    assert "1 of 3 failed" in done.stderr
    results = json.loads((tmp_path / "sweep-broken.json").read_text("utf-8"))
    assert list(results["choices"]) == ["fused", "hlo", "flags"]
    (row,) = results["choices"]["fused"]["rows"]
    assert row["failed"] == "ValueError: it broke"
    (row,) = results["choices"]["flags"]["rows"]
    assert "known for GPUs only" in row["skipped"]


@pytest.mark.slow
def test_a_budget_leaves_out_the_rest(tmp_path, limits_file):
    arguments = ["--shape=demo", "--size=small", "--budget_s=0", "--only=fused,hlo"]
    done = sweep(*arguments, f"--limits={limits_file}", f"--output={tmp_path}", "--name=none")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sweep-none.json").read_text("utf-8"))
    assert (results["choices"], results["left_out"]) == ({}, ["fused", "hlo"])
    assert "left out, the budget is spent: fused, hlo" in done.stdout


def test_operations_are_counted_outside_fusions():
    text = """HloModule jit_decode, is_scheduled=true

%fused_computation (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %convert.1 = bf16[8]{0} convert(%param_0)
}

%body.2 (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg = (s32[], f32[4,8]{1,0}) parameter(0)
  %copy.1 = f32[4,8]{1,0:T(8,128)} copy(%arg)
  ROOT %tuple = (s32[], f32[4,8]{1,0}) tuple(%arg, %copy.1)
}

ENTRY %main.3 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %fusion = bf16[8]{0} fusion(%a), kind=kLoop, calls=%fused_computation
  %while = (s32[], /*index=1*/f32[4,8]{1,0}) while(%a), condition=%cond, body=%body.2
  ROOT %convert = f32[8]{0} convert(%fusion)
}
"""
    counts, moves = count_operations(text)
    counted = {name: counts[name] for name in ("copy", "convert", "fusion", "while", "tuple")}
    assert counted == {"copy": 1, "convert": 1, "fusion": 1, "while": 1, "tuple": 1}
    assert moves == [
        (128, "copy f32[4,8]{1,0:T(8,128)}", 1),
        (32, "convert f32[8]{0}", 1),
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs bash and coreutils' timeout")
def test_the_script_for_gpus(tmp_path):
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    steps = {"SMALL": "1", "STEPS": "limits one dtypes sweep wrong", "CHOICES": "hlo"}
    done = subprocess.run(
        ["bash", str(script)],
        env={**os.environ, **steps, "AGAINST": "", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    head, limits, one, dtypes, swept, wrong = done.stdout.splitlines()
    assert head.startswith("demo, ")
    assert limits.startswith("limits: done, ")
    assert one.startswith("one: done, ")
    assert dtypes == "dtypes: left out, one dtype only"
    assert swept.startswith("sweep: done, ")
    assert wrong.startswith("wrong: no such step; expected install limits one")
    assert (tmp_path / "summary.txt").read_text("utf-8") == done.stdout
    for name in ("e2e-one.json", "sweep-demo.json", "compiled-demo-float32.txt", "one.log"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.slow
def test_checkpoints_are_measured_at_every_step(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.checkpoints", "--shape=demo"),
            *("--dtype=float32,float16", f"--folder={tmp_path}", f"--output={tmp_path / 'out'}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what was made is removed
    text = (tmp_path / "out" / "checkpoints-demo-float32-float16.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert list(record["steps"]) == ["convert", "verify", "load, one token", "export"]
    assert record["source_bytes"] == 2 * record["stored_bytes"]
    assert "rounded" in record["steps"]["convert"]["said"]
    assert "root" in record["steps"]["verify"]["said"]
    for step in record["steps"].values():
        assert step["peak_bytes"] > 2**26
        assert step["seconds"] > 0
    assert "% of the disk's speed" in done.stdout
