"""The files of a batch: pipes, devices and full disks."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading

import pytest

from llama_jax import InputError
from llama_jax.batch import Batch, requests
from tests.helpers import ROOT
from tests.helpers.batches import answers, run
from tests.helpers.demo import load_demo


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=2)


@pytest.fixture
def files(tmp_path):
    """Eight requests, of which one is no JSON, and an empty line."""
    lines = [json.dumps({"prompt": "Hi", "seed": i, "max_tokens": 3}) for i in range(1, 8)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", "{", *lines[2:]]))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_pipe_is_read_as_a_file_is_and_resumed(files, fifo, llm):
    """The results are those of a file, so either can continue the other's."""
    _, _, expected = run(files, llm)
    text = files[1].read_bytes()
    lines = text.splitlines(keepends=True)
    for kept in (0, 3):
        files[1].write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
        writer = threading.Thread(target=fifo.write_bytes, args=(files[0].read_bytes(),))
        writer.start()
        batch, steps, rows = run((fifo, files[1]), llm)
        writer.join()
        assert (batch.total, steps, batch.failed) == (8, 8 - kept, 1)
        assert answers(rows) == answers(expected)
    assert run(files, llm)[1] == 0


@pytest.mark.parametrize("verb", ["batch", pytest.param("score", marks=pytest.mark.slow)])
def test_both_verbs_read_stdin_from_a_pipe(tmp_path, verb):
    line = {"batch": {"prompt": "Hi", "max_tokens": 1}, "score": {"text": "Hello there"}}[verb]
    command = [sys.executable, ROOT / "run.py", verb, "--input=/dev/stdin", "--output=out"]
    text = "\n".join(json.dumps(line) for _ in range(3))
    done = subprocess.run(
        command, input=text, cwd=tmp_path, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "out").read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3]
    assert all("result" in row for row in rows)


def test_a_pipe_that_cannot_be_copied_is_one_line(tmp_path, fifo):
    """A full disk there, by a limit on the size of a file."""
    writer = threading.Thread(target=fifo.write_bytes, args=(b"{}\n" * 1000,))
    writer.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            InputError, match=r"fifo cannot be copied to .* \(File too large\); make"
        ):
            Batch(fifo, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.join()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/urandom"])
def test_a_device_is_no_input(tmp_path, device):
    with pytest.raises(InputError, match=f"{device} is a device, expected a file or a pipe"):
        Batch(device, tmp_path / "out")


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_an_output_that_keeps_nothing_is_refused(files, fifo, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        path = {"device": "/dev/null"}.get(kind, kind)
        what = {"fifo": "pipe"}.get(kind, kind)
        with pytest.raises(InputError, match=f"{path}: it is a {what}, expected a file; name"):
            Batch(files[0], path)


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "LINE_BYTES", 100)
    (tmp_path / "in").write_text("{}\n" + " " * 99 + "\n" + "x" * 101)
    with pytest.raises(InputError, match=r"in, line 3, has more than 100 bytes, expected JSON"):
        Batch(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("room", [0, 300, 1500])
def test_a_full_disk_is_one_line_and_resumed(files, llm, room):
    """By a limit on the size of a file; nothing of a line that did not fit is left."""
    _, _, expected = run(files, llm)
    whole = files[1].read_bytes()
    files[1].write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(InputError) as error:
            run(files, llm)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    done = files[1].read_bytes().count(b"\n")
    assert done < 8
    assert str(error.value) == (
        f"{files[1]} cannot be written (File too large) after {done} of 8 results; make room and "
        "run the same again: it continues there"
    )
    assert files[1].read_bytes().endswith(b"\n") or not done
    _, steps, rows = run(files, llm)
    assert steps == 8 - done
    assert answers(rows) == answers(expected)
    assert len(files[1].read_bytes().splitlines()) == len(whole.splitlines())


def test_results_with_other_fields_are_refused(files, llm):
    """Even if their beginnings are right."""
    run(files, llm)
    first, *rest = files[1].read_text().splitlines(keepends=True)
    row = {**json.loads(first), "ignored": [{}]}
    files[1].write_text(json.dumps(row) + "\n" + "".join(rest))
    with pytest.raises(
        InputError, match=r"out\.jsonl: ignored is \[\{\}\], expected names; name a"
    ):
        Batch(*files)
