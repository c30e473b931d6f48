"""A file of requests: order, errors by line, resuming, and one writer at a time."""

import json

import pytest

from llama_jax import InputError, Llama
from llama_jax.batch import Batch
from llama_jax.demo import DEMO_CHECKPOINT

REQUESTS = [
    {"prompt": "What is the capital of France?", "temperature": 0},
    {"prompt": "Tell me a story about a llama.", "seed": 3, "max_tokens": 60},
    {"prompt": "Hello", "temperature": 9},
    {"messages": [{"role": "assistant", "content": "Hello"}]},
    {"prompt": "Hi", "temperature": 3, "seed": 4, "max_tokens": 20, "lora": "x", "stream": True},
    {"prompt": "Hi", "max_tokens": 5000},
    {"prompt": "What is the capital of Japan?", "temperature": 0},
]


@pytest.fixture(scope="module")
def llm():
    return Llama.load(DEMO_CHECKPOINT, slots=2)


@pytest.fixture
def files(tmp_path):
    """The two files; an empty line and one that is no JSON are among the requests."""
    lines = [json.dumps(request) for request in REQUESTS]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", "{", *lines[2:]]))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(files, llm):
    with Batch(*files) as batch:
        steps = sum(1 for _ in batch.run(llm))
    return batch, steps, [json.loads(line) for line in files[1].read_text().splitlines()]


def answers(rows):
    return [row["result"]["tokens"] if "result" in row else row["error"] for row in rows]


def test_results_are_in_order_and_equal_those_of_single_requests(files, llm):
    batch, steps, rows = run(files, llm)
    assert (batch.total, batch.done, steps, batch.failed) == (8, 8, 8, 4)
    assert [row["line"] for row in rows] == [1, 2, 4, 5, 6, 7, 8, 9]
    errors = [row.get("error", "") for row in rows]
    expected = {
        2: "the request: not JSON",
        3: "'/temperature' must be <= 5",
        4: "has the role assistant",
        6: "max_tokens is 5,000, but the context holds 512",
    }
    for i, error in enumerate(errors):
        part = expected.get(i, "")
        assert part in error
        assert bool(part) == bool(error)
    assert rows[5]["ignored"] == ["lora", "stream"]
    for row, request in zip((rows[0], rows[1], rows[7]), (0, 1, 6), strict=True):
        assert row["result"]["tokens"] == llm.generate(**REQUESTS[request]).tokens
    assert rows[0]["result"]["response"] == "The capital of France is Paris."


@pytest.mark.parametrize("whole_lines", [0, 1, 3, 7, 8])
def test_a_stopped_batch_resumes_after_its_last_whole_line(files, llm, whole_lines):
    """Killed between two lines, or in the middle of one."""
    _, _, expected = run(files, llm)
    text = files[1].read_bytes()
    lines = text.splitlines(keepends=True)
    files[1].write_bytes(b"".join(lines[:whole_lines]) + b"".join(lines[whole_lines:])[:40])
    batch, steps, rows = run(files, llm)
    assert steps == 8 - whole_lines
    assert batch.failed == 4
    assert answers(rows) == answers(expected)
    assert files[1].read_bytes().splitlines(keepends=True)[:whole_lines] == lines[:whole_lines]


def test_results_of_other_requests_are_not_continued(files, llm):
    run(files, llm)
    kept = files[1].read_bytes()
    files[0].write_text(files[0].read_text().replace("story", "tale"))
    with pytest.raises(
        InputError, match=r"out\.jsonl, line 2, is not a result of .*in\.jsonl, line 2"
    ):
        Batch(*files)
    assert files[1].read_bytes() == kept


@pytest.mark.parametrize(
    "text", ["[1]\n", "3\n", '{"line": 1}\n', "<html>\n", "no newline", "\x00"]
)
def test_a_file_with_other_content_is_not_written_to(files, text):
    files[1].write_text(text)
    with pytest.raises(InputError, match=r"out\.jsonl, line 1"):
        Batch(*files)
    assert files[1].read_text() == text


def test_more_results_than_requests_are_refused_and_kept(files, llm):
    run(files, llm)
    kept = files[1].read_bytes()
    files[0].write_text("\n".join(files[0].read_text().splitlines()[:3]))
    with pytest.raises(InputError, match="more lines than"):
        Batch(*files)
    assert files[1].read_bytes() == kept


def test_a_long_answer_does_not_block_the_requests_after_it(tmp_path, llm):
    """While one slot generates it, the other takes one request after the other."""
    short = [{"prompt": "Hi", "seed": seed, "max_tokens": 2} for seed in range(1, 9)]
    long = {"prompt": "Hi", "seed": 1, "max_tokens": 90, "ignore_eos": True}
    source = iter([long, *short])
    next(llm.generate_all(source))
    assert next(source, None) is None


def test_a_lone_surrogate_in_a_name_is_written_as_it_came(tmp_path, llm):
    (tmp_path / "in").write_text('{"prompt": "Hi", "seed": 1, "max_tokens": 1, "\\ud800": 1}')
    (row,) = run((tmp_path / "in", tmp_path / "out"), llm)[2]
    assert row["result"]["tokens"]
    assert row["ignored"] == ["\ud800"]


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "same").write_text("{}")
    with pytest.raises(InputError, match="is both input and output"):
        Batch(tmp_path / "same", tmp_path / "same")
    assert (tmp_path / "same").read_text() == "{}"
    with pytest.raises(InputError, match=r"none\.jsonl: No such file or directory; name another"):
        Batch(tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in").touch()
    with pytest.raises(InputError, match="none/out: No such file or directory"):
        Batch(tmp_path / "in", tmp_path / "none" / "out")
    with pytest.raises(InputError, match="Is a directory"):
        Batch(tmp_path / "in", tmp_path)
