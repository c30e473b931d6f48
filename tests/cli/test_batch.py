"""The verb batch; the files are tested in tests/test_batch.py."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.commands import run_py

HOLDER = """
import sys
from llama_jax import Llama
from llama_jax.batch import Batch
with Batch(*sys.argv[1:]) as batch:
    steps = batch.run(Llama.load())
    next(steps)
    print("one line is written", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def files(tmp_path):
    requests = [{"prompt": "Hi", "seed": seed, "max_tokens": 3} for seed in (1, 2, 3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def arguments(files):
    return "batch", f"--input={files[0]}", f"--output={files[1]}"


def test_a_second_process_is_refused_and_writes_nothing(files):
    """Not even where the first has written half a line, which a resumed run cuts off."""
    source, output = files
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, source, output],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "one line is written\n"
        with output.open("ab") as file:
            file.write(b'{"line": 2')
        before = output.read_bytes()
        done = run_py(*arguments(files))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {output} is in use by another run, expected one at")
        assert done.stderr.count("\n") == 1
        assert output.read_bytes() == before
        holder.kill()
    done = run_py(*arguments(files))  # the lock ended with its process
    assert done.returncode == 0
    assert f"{output} has 1 of 3 results already; resuming" in done.stderr
    assert output.read_bytes().startswith(before.removesuffix(b'{"line": 2'))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["line"], len(row["result"]["tokens"])) for row in rows] == [(1, 3), (2, 3), (3, 3)]


def test_requests_with_errors_are_counted_and_exit_2(files, cli):
    files[0].write_text(files[0].read_text().replace('"max_tokens": 3', '"max_tokens": -3', 1))
    status, out, err = cli(*arguments(files))
    assert (status, out) == (2, "")
    expected = f"error: 1 of 3 requests have an `error` in {files[1]}; fix them and run them as "
    assert expected in err.splitlines()[-1]
    assert len(files[1].read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "batch needs --input and --output, two files of JSON lines; name both"),
        (["--input=a", "--output=json"], "batch needs --input and --output"),
        (["--input=none.jsonl", "--output=x"], "none.jsonl: No such file or directory"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_2(mistake, flags, expected):
    assert expected in mistake("batch", *flags)
