"""A trace of decoded tokens: what counts as an operation, and that one can be taken."""

import json
import subprocess
import sys

import pytest

from benchmarks import trace
from benchmarks.trace import Event
from benchmarks.worker import EngineError
from tests.helpers import ROOT

THREADS = [
    [
        Event("copy", 0, 90),  # before the loop
        Event("end: copy", 90, 91),
        Event("while", 100, 200),
        Event("ThunkExecutor::Execute", 100, 199),
        Event("ffi_call", 110, 140),
        Event("end: ffi_call", 140, 141),
        Event("end: while", 200, 201),
    ],
    [
        Event("conditional", 150, 200),
        Event("add_fusion", 150, 160),
        Event("end: add_fusion", 160, 161),
        Event("ffi_call", 155, 175),  # begins before the other's end is noted
        Event("copy", 190, 200),
        Event("end: conditional", 200, 201),
    ],
]


def test_operations_are_those_in_the_loops_and_the_rest_is_gaps():
    rows = trace.make_rows(THREADS, tokens=2)
    assert [list(row.values()) for row in rows] == [
        ["ffi_call", 1.0, 0.0, 0.5],
        ["add_fusion", 0.5, 0.0, 0.1],
        ["copy", 0.5, 0.0, 0.1],
        ["gaps", None, 0.0, 0.35],
    ]


def test_a_trace_without_the_loop_is_refused():
    with pytest.raises(EngineError, match=r"has no operation 'while'.* try fewer --new_tokens"):
        trace.make_rows([[Event("copy", 0, 9), Event("end: copy", 9, 10)]], tokens=2)


@pytest.mark.exhaustive
def test_a_trace_is_taken(tmp_path):
    flags = ["--shape=demo", "--dtype=float32", "--context=64", "--new_tokens=16", "--name=demo"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trace", *flags, f"--output={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "demo.json").read_text("utf-8"))
    assert record["rows"][-1]["operation"] == "gaps"
    assert sum(row["share"] for row in record["rows"]) == pytest.approx(1, abs=0.05)
    assert all(row["share"] >= 0 for row in record["rows"])
    assert record["ms_per_token_untraced"] > 0


def test_a_mistake_is_one_line_and_exit_2(cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, _, err = cli(trace, "--dtype=int8")
    assert status == 2
    assert "--dtype has 'int8'" in err
