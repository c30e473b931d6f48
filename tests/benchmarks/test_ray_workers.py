"""The benchmark of Ray's workers: its turns, its arithmetic, and that it runs. Never how fast."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.ray_workers import Side, make_report, summarise
from benchmarks.worker import EngineError
from tests.helpers.measuring import measure

WRITER = """
import json, time
with open({path!r}, "a", buffering=1) as file:
    for _ in range(6000):
        print(json.dumps({{"result": {{"usage": {{"completion_tokens": 3}}}}}}), file=file)
        time.sleep(0.01)
"""


@pytest.fixture
def side(tmp_path):
    """A process whose child writes rows of three tokens."""
    pytest.importorskip("psutil", reason="needs the bench extra")
    path = tmp_path / "rows.jsonl"
    writer = [sys.executable, "-c", WRITER.format(path=str(path))]
    command = f"import subprocess; subprocess.run({writer!r})"
    process = subprocess.Popen([sys.executable, "-c", command])
    side = Side("one", [process], [path])
    try:
        yield side
    finally:
        side.end()


@pytest.mark.slow
def test_a_side_computes_in_its_turn_only(side):
    import psutil

    side.wait_for(2)
    side.send(signal.SIGSTOP)
    family = [psutil.Process(pid) for pid in side._find()]
    assert len(family) == 2
    while {one.status() for one in family} != {psutil.STATUS_STOPPED}:
        time.sleep(0.01)
    rows = len(side.answers())
    time.sleep(0.3)
    assert len(side.answers()) == rows
    before = side.tokens()
    assert before == 3 * rows
    while side.tokens() == before:
        side.take_turn(0.5)
    assert side.turns[-1] > 0
    family[0].kill()
    family[1].kill()
    side.processes[0].wait()
    with pytest.raises(EngineError, match="one: a process ended early"):
        side.take_turn(0)
    with pytest.raises(EngineError, match="one: a process ended early"):
        side.wait_for(10**9)


@pytest.mark.slow
def test_what_a_process_started_ends_with_the_side(side):
    """Though it is stopped, and the process that started it is gone."""
    import psutil

    side.wait_for(1)
    side.send(signal.SIGSTOP)
    family = [psutil.Process(pid) for pid in side._find()]
    side.processes[0].kill()
    side.processes[0].wait()
    side.end()
    psutil.wait_procs(family, timeout=30)
    assert not any(one.is_running() for one in family)


def test_a_failed_row_ends_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"line": 1, "error": {"message": "too long"}}) + "\n{", "utf-8")
    with pytest.raises(EngineError, match=r"one: a row failed: .*too long"):
        Side("one", [], [path]).tokens()


def test_ray_is_compared_with_the_mean_of_all_turns():
    found = summarise([Side("local", [], [], [100.0, 140.0]), Side("ray", [], [], [90.0, 126.0])])
    # Of two turns 20 tokens/s from their mean, and 18: the means' errors are 1/6 of them.
    assert found["error"] == pytest.approx(0.9 * math.sqrt(2) / 6)
    assert found["tokens_per_s"] == {"local": 120.0, "ray": 108.0}
    report = "108 tokens/s on Ray, 120 of local processes: 0.90 times (standard error 0.21)"
    assert make_report(found) == report


@pytest.mark.exhaustive
def test_ray_workers_end_to_end(tmp_path):
    pytest.importorskip("ray", reason="needs the ray extra")
    flags = ("--dtype=float32", "--slots=2", "--rounds=2", "--seconds=1")
    (row,) = measure("ray_workers", tmp_path, *flags)["ray_workers"]
    assert row["share"] > 0
    assert {len(turns) for turns in row["turns"].values()} == {2}
