"""The verb batch; the files are tested in tests/test_batch.py."""

import json
import sys

import pytest

from llama_jax.batch import Batch


@pytest.fixture
def files(tmp_path):
    requests = [{"prompt": "Hi", "seed": seed, "max_tokens": 3} for seed in (1, 2, 3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def arguments(files):
    return "batch", f"--input={files[0]}", f"--output={files[1]}"


def test_an_output_in_use_is_refused_and_resumed_once_it_is_closed(files, cli, mistake, demo):
    """Refused even where half a line is written, which a resumed run cuts off."""
    with Batch(*files) as batch:
        next(batch.run(demo))
        line = files[1].read_bytes()
        with files[1].open("ab") as file:
            file.write(b'{"line": 2')
        assert f"{files[1]} is in use by another run, expected one" in mistake(*arguments(files))
        assert files[1].read_bytes() == line + b'{"line": 2'
    status, _, err = cli(*arguments(files))
    assert status == 0
    assert f"{files[1]} has 1 of 3 results already; resuming" in err
    assert files[1].read_bytes().startswith(line)
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [(row["line"], len(row["result"]["tokens"])) for row in rows] == [(1, 3), (2, 3), (3, 3)]


def test_requests_with_errors_are_counted_and_exit_2(files, cli):
    files[0].write_text(files[0].read_text().replace('"max_tokens": 3', '"max_tokens": -3', 1))
    status, out, err = cli(*arguments(files))
    assert (status, out) == (2, "")
    expected = f"error: 1 of 3 requests have an `error` in {files[1]}; fix them and run them as "
    assert expected in err.splitlines()[-1]
    assert len(files[1].read_text().splitlines()) == 3


def test_fields_without_effect_are_counted_by_name_on_stderr(files, cli):
    """Those of a resumed run's first part too."""
    message = {"role": "user", "content": "Hi", "name": "me"}
    requests = [
        {"prompt": "Hi", "max_tokens": 1, "lora": "x", "stream": True},
        {"messages": [message], "max_tokens": 1, "lora": "y"},
        {"prompt": "Hi", "max_tokens": 1},
    ]
    files[0].write_text("\n".join(map(json.dumps, requests)))
    expected = "lora (2), stream (1), messages[].name (1)"
    for kept in (0, 1, 3):
        lines = files[1].read_bytes().splitlines(keepends=True) if kept else []
        files[1].write_bytes(b"".join(lines[:kept]))
        status, _, err = cli(*arguments(files))
        assert status == 0
        [warning] = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert warning.endswith(f"were ignored, in so many lines: {expected}")


def test_both_files_may_be_in_the_home_folder(files, cli, monkeypatch):
    monkeypatch.setenv("HOME", str(files[0].parent))
    status, _, err = cli("batch", "--input=~/in.jsonl", "--output=~/out.jsonl")
    assert (status, "warning" in err) == (0, False)
    assert len(files[1].read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "batch needs --input and --output, two files of JSON lines; name both"),
        (["--input=a", "--output=json"], "batch needs --input and --output"),
        (["--input=none.jsonl", "--output=x"], "none.jsonl: No such file or directory"),
        (["--input=~no-one/in", "--output=x"], "~no-one/in, x: Could not determine home"),
        (["--input=a", "--output=x", "--workers=2"], "--workers is given without --engine=ray"),
        (
            ["--input=a", "--output=x", "--engine=ray", "--receipt=r"],
            "--receipt is given with --engine=ray, whose workers are processes of Ray's; drop it",
        ),
        (["--input=a", "--output=x", "--seed=-1"], "seed is -1, expected a whole number from 0"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_2(mistake, flags, expected):
    assert expected in mistake("batch", *flags)


def test_ray_without_its_extra_is_one_line(files, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_jax.ray", None)
    expected = "is not installed; pip install 'llama_jax[ray]'"
    assert expected in mistake(*arguments(files), "--engine=ray")
    assert not files[1].exists()


def test_a_pool_of_ray_s_that_cannot_be_is_one_line(files, mistake):
    pytest.importorskip("ray", reason="needs the ray extra: pip install -e '.[ray]'")
    expected = "workers is 0, expected a whole number from 1"
    assert expected in mistake(*arguments(files), "--engine=ray", "--workers=0")


def test_the_seed_of_a_batch_decides_those_of_its_lines(files, cli):
    files[0].write_text('{"prompt": "Hi", "max_tokens": 1}')
    seeds = []
    for seed in ("0", "1", "0"):
        files[1].unlink(missing_ok=True)
        assert cli(*arguments(files), f"--seed={seed}")[0] == 0
        seeds.append(json.loads(files[1].read_text())["result"]["seed"])
    assert seeds[0] == seeds[2] != seeds[1]
