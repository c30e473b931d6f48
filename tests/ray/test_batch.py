"""Batches on Ray: the rows of the local engine, whatever dies on the way."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from llama_jax import InputError
from llama_jax.batch import Batch
from llama_jax.batch.line import head
from llama_jax.engine.line_seeds import line_seed
from tests.helpers import ROOT
from tests.helpers.demo import load_demo
from tests.helpers.processes import END_S
from tests.helpers.ray_batches import (
    LOAD,
    comparable,
    harms,
    kills_once,
    local,
    requests,
    write,
)
from tests.helpers.serving import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=8)


def run(files, **pool):
    """Answer a file on the cluster; return the last progress and the rows."""
    from llama_jax.ray import Pool, run_batch

    progress = None
    with Batch(*files) as batch:
        for progress in run_batch(batch, LOAD, Pool(**pool)):
            assert progress.workers <= pool.get("workers", 1) + 2  # those that died lately too
    return progress, comparable(files[1])


_MANY = [pytest.mark.exhaustive, pytest.mark.long]


@pytest.mark.parametrize(
    ("count", "workers", "rows"),
    [
        (120, 1, 64),
        (120, 2, 1),
        *(pytest.param(2000, workers, rows, marks=_MANY) for workers in (1, 2) for rows in (1, 64)),
    ],
)
def test_rows_are_those_of_the_local_engine(cluster, llm, tmp_path, count, workers, rows):
    files = write(tmp_path, requests(count))
    progress, answered = run(files, workers=workers, rows_per_call=rows)
    assert progress.rows == count - 1  # one line is empty
    assert answered == local(files[0], llm)
    results = [json.loads(row) for row in files[1].read_bytes().splitlines()]
    assert sum(bool(row.get("error")) for row in results) >= 5


def test_a_killed_worker_is_started_again_and_loses_no_row(cluster, llm, tmp_path):
    lines = requests(120)
    lines[40] = json.dumps({"prompt": f"kill once {tmp_path / 'killed'}", "max_tokens": 4}).encode()
    files = write(tmp_path, lines)
    _, answered = run(files, workers=2, rows_per_call=8, format_of=kills_once)
    assert (tmp_path / "killed").exists()
    assert answered == local(files[0], llm)


def test_lines_that_end_every_worker_get_an_error_in_their_place(cluster, llm, tmp_path):
    lines = requests(60)
    files = write(tmp_path, lines)
    expected = local(files[0], llm)
    lines[20] = b'{"prompt": "raise always", "custom_id": "a"}'
    lines[45] = b'{"prompt": "kill always", "metadata": {"b": 1}}'
    files = write(tmp_path, lines)
    _, answered = run(files, workers=2, rows_per_call=8, format_of=harms)
    for index, given in ((19, {"custom_id": "a"}), (44, {"metadata": {"b": 1}})):
        row = json.loads(answered[index])
        error = row.pop("error")
        assert error == "this request ended 3 workers, one after the other"
        assert row == head(index + 2, lines[index + 1]) | given
        answered[index] = expected[index] = b""
    assert answered == expected


def test_workers_that_cannot_load_are_one_error(cluster, tmp_path):
    from llama_jax.ray import Pool, run_batch

    files = write(tmp_path, requests(20))
    with Batch(*files) as batch, pytest.raises(InputError, match=r"cannot go on: .*none.*"):
        list(run_batch(batch, {"path": str(tmp_path / "none")}, Pool()))
    assert files[1].read_bytes() == b""


def test_each_worker_computes_with_its_share_of_the_cores(cluster, tmp_path):
    import ray

    from llama_jax.ray.cores import environment

    @ray.remote(num_cpus=0.5, runtime_env={"env_vars": dict(environment(1))})
    def threads():
        import jax.numpy as jnp

        jnp.ones((64, 64)).block_until_ready()
        tasks = pathlib.Path("/proc/self/task").iterdir()
        return [name for task in tasks if "XLAEigen" in (name := (task / "comm").read_text())]

    assert len(ray.get(threads.remote())) == 1


# The command.


def command(files, *flags):
    return [
        *(sys.executable, str(ROOT / "run.py"), "batch", f"--input={files[0]}"),
        *(f"--output={files[1]}", "--engine=ray", *flags),
    ]


def run_command(files, *flags):
    return subprocess.run(
        command(files, *flags), cwd=ROOT, capture_output=True, text=True, timeout=END_S
    )


def ray_processes(session: int) -> list[str]:
    """Return the commands of the processes that a process group has left."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.getsid(int(pid)) == session:
                found.append(pathlib.Path(f"/proc/{pid}/cmdline").read_text())
    return found


def test_a_killed_driver_continues_and_leaves_no_process(cluster, llm, tmp_path):
    files = write(tmp_path, requests(120))
    flags = ("--workers=2", "--rows_per_call=4")
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        driver = subprocess.Popen(
            command(files, *flags), cwd=ROOT, stderr=stderr, start_new_session=True
        )

    def some_rows() -> bool:
        assert driver.poll() is None, log.read_text()
        return files[1].exists() and files[1].read_bytes().count(b"\n") > 20

    try:
        wait_until(some_rows, END_S)
        driver.send_signal(signal.SIGKILL)
        driver.wait(END_S)
        kept = files[1].read_bytes()
        assert kept.count(b"\n") < 119
        wait_until(lambda: not ray_processes(driver.pid), END_S)
        assert files[1].read_bytes() == kept
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    ended = run_command(files, *flags, f"--ray_address={cluster}")
    whole = kept[: kept.rindex(b"\n") + 1].count(b"\n")
    assert f"has {whole} of 119 results already; resuming" in ended.stderr
    assert ended.returncode == 2
    assert "requests have an `error`" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert files[1].read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert comparable(files[1]) == local(files[0], llm)


def test_parquet_is_read_by_ray_and_answered_as_json_lines(cluster, llm, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": f"Hello {i}", "max_tokens": 3, "seed": None if i % 3 else i + 1}
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=5)
    url = f"file://{tmp_path / 'in.parquet'}"
    ended = run_command((url, tmp_path / "out.jsonl"), "--seed=9", f"--ray_address={cluster}")
    assert ended.returncode == 0, ended.stderr
    answered = [json.loads(row) for row in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    for i, row in enumerate(answered):
        given = {name: value for name, value in rows[i].items() if value is not None}
        assert row["line"] == i + 1
        assert row["sha256"] == head(i + 1, json.dumps(given).encode())["sha256"]
        seed = line_seed(9, i + 1, row["sha256"]) if i % 3 else i + 1
        assert row["result"]["seed"] == seed
        assert row["result"]["tokens"] == llm.generate(**given | {"seed": seed}).tokens
