"""A file of requests: order, errors by line, resuming, and one writer at a time."""

import hashlib
import json
import sys

import pytest

from llama_jax import InputError
from llama_jax.batch import Batch
from llama_jax.card.schemas import MODEL
from llama_jax.engine.line_seeds import line_seed
from tests.helpers.batches import answers, run
from tests.helpers.demo import load_demo
from tests.helpers.serving import CHAT, COMPLETIONS, serving

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
    return load_demo(slots=2)


@pytest.fixture
def files(tmp_path):
    """The two files; an empty line and one that is no JSON are among the requests."""
    lines = [json.dumps(request) for request in REQUESTS]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", "{", *lines[2:]]))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


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


# What may come back, and parameters that are not the card's.

PARIS = {"prompt": "What is the capital of France?", "temperature": 0}


def run_lines(tmp_path, llm, *lines):
    """Run requests, one of which may be text; return the lines of output."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "in").write_text("\n".join(texts))
    (tmp_path / "out").unlink(missing_ok=True)
    return run((tmp_path / "in", tmp_path / "out"), llm)[2]


def test_custom_id_and_metadata_come_back(tmp_path, llm):
    rows = run_lines(
        tmp_path,
        llm,
        {**PARIS, "custom_id": "row-1", "metadata": {"a": [1, None]}, "max_tokens": 2},
        {**PARIS, "custom_id": 7, "metadata": 0, "max_tokens": 2},
        {"custom_id": "bad", "metadata": "m", "prompt": "Hi", "temperature": 9},
        {**PARIS, "custom_id": None, "metadata": None, "max_tokens": 2},
    )
    given = [{n: row[n] for n in ("custom_id", "metadata") if n in row} for row in rows]
    assert given == [
        {"custom_id": "row-1", "metadata": {"a": [1, None]}},
        {"custom_id": 7, "metadata": 0},
        {"custom_id": "bad", "metadata": "m"},
        {},
    ]
    assert ["error" in row for row in rows] == [False, False, True, False]
    assert not any(row.get("ignored") for row in rows)


@pytest.mark.slow
def test_parameters_of_this_project_are_honoured(tmp_path, llm):
    ours = {"stop": "Paris", "logprobs": 2, "prompt_logprobs": True, "seed": 2**64 - 1}
    paris = llm.generate(**PARIS).tokens
    chosen = {"logit_bias": {str(paris[0]): -100}, "allowed_tokens": paris, "min_p": 0.1}
    stopped, endless, biased, wrong, wrong_seed, wrong_id = run_lines(
        tmp_path,
        llm,
        {**PARIS, **ours},
        {**PARIS, "ignore_eos": True, "max_tokens": 20, "seed": 0, "stop": None},
        {**PARIS, **chosen, "max_tokens": 20},
        {**PARIS, "stop": [3]},
        {**PARIS, "seed": 2**64},
        {**PARIS, "allowed_tokens": [5000]},
    )
    assert stopped["ignored"] == endless["ignored"] == biased["ignored"] == []
    expected = llm.generate(**PARIS, **ours)
    assert stopped["result"]["response"] == expected.response == "The capital of France is "
    assert len(stopped["result"]["logprobs"][0]["top"]) == 2
    assert len(stopped["result"]["prompt_logprobs"]) == len(expected.prompt_tokens)
    assert (stopped["result"]["seed"], endless["result"]["seed"]) == (2**64 - 1, 0)
    assert len(endless["result"]["tokens"]) == 20
    assert set(biased["result"]["tokens"]) <= set(paris) - {paris[0]}
    assert biased["result"]["tokens"] == llm.generate(**PARIS, **chosen, max_tokens=20).tokens
    assert "allowed_tokens has the token id 5000, expected ids from 0 to 1023" in wrong_id["error"]
    assert "stop is [3], expected a string, or a list" in wrong["error"]
    assert "expected an integer from 0 to 18446744073709551615" in wrong_seed["error"]


def test_a_custom_id_is_of_one_line_only(tmp_path, llm):
    lines = [{**PARIS, "max_tokens": 1, "custom_id": x} for x in ("a", "b", "a", 1, "1", True, [])]
    rows = run_lines(tmp_path, llm, *lines)
    errors = [row.get("error") for row in rows]
    assert errors[:2] == errors[3:5] == [None, None]
    assert errors[2] == "custom_id is 'a', which line 1 has too, expected one of its own"
    assert errors[5:] == [
        "custom_id is True, expected a string or an integer",
        "custom_id is [], expected a string or an integer",
    ]
    # A resumed run knows those of the lines that are done.
    text = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join(text[:2]))
    again = run((tmp_path / "in", tmp_path / "out"), llm)[2]
    assert [row.get("error") for row in again] == errors


# OpenAI's format.


def openai_line(custom_id, url, **body):
    body = {"model": MODEL, "seed": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


QUESTION = {"messages": [{"role": "user", "content": PARIS["prompt"]}]}
BODIES = [
    (CHAT, {**QUESTION, "temperature": 0}),
    (CHAT, {**QUESTION, "temperature": 2, "n": 3, "max_tokens": 9, "logprobs": True, "stop": "."}),
    (COMPLETIONS, {"prompt": ["Once", [1, 500]], "n": 2, "max_tokens": 5, "user": "u"}),
    (COMPLETIONS, {"prompt": "Once upon", "echo": True, "logprobs": 1, "max_tokens": 1}),
    (CHAT, {**QUESTION, "top_p": 9}),
    (CHAT, {**QUESTION, "tools": [{"type": "function"}]}),
    (CHAT, {**QUESTION, "model": "gpt-4"}),
    (COMPLETIONS, {"prompt": ["x", [1, 2]], "max_tokens": 511}),
    (COMPLETIONS, {"prompt": "x", "n": 9}),
]


def comparable(body):
    """Return a response without what differs between two calls."""
    if "error" in body:
        return {name: body["error"][name] for name in ("type", "param", "code")}
    body["usage"].pop("prompt_tokens_details")  # the prefix cache
    return {name: value for name, value in body.items() if name not in ("id", "created")}


@pytest.mark.slow
def test_openai_s_format_gives_what_the_server_gives(tmp_path, llm):
    lines = [openai_line(f"row-{i}", url, **body) for i, (url, body) in enumerate(BODIES)]
    rows = run_lines(tmp_path, llm, *lines)
    with serving(llm) as client:
        for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
            expected = client.post(line["url"], json=line["body"])
            assert (row["line"], row["custom_id"]) == (i + 1, f"row-{i}")
            response = row["response"]
            assert response["status_code"] == expected.status_code
            assert comparable(response["body"]) == comparable(expected.json())
            if expected.status_code == 200:
                assert row["error"] is None
            else:
                error = response["body"]["error"]
                assert row["error"] == {name: error[name] for name in ("code", "message")}
    assert len({row["id"] for row in rows}) == len(rows)
    statuses = [row["response"]["status_code"] for row in rows]
    assert statuses == [200] * 4 + [400, 400, 404, 400, 400]
    assert rows[2]["ignored"] == ["body.user"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"custom_id": None}, "custom_id is missing, expected a string that names this request"),
        ({"url": "/v1/embeddings"}, "url is '/v1/embeddings', expected /v1/chat/completions or"),
        ({"url": None}, "url is None, expected /v1/chat/completions or /v1/completions"),
        ({"method": "GET"}, "method is 'GET', expected 'POST'"),
        ({"method": None}, "method is None, expected 'POST'"),
        ({"body": "x"}, "body is 'x', expected an object: the request"),
    ],
)
def test_a_line_in_openai_s_format_that_is_wrong(tmp_path, llm, change, expected):
    """The other lines go on, in either format."""
    good = openai_line("good", CHAT, **QUESTION, temperature=0)
    wrong = {**openai_line("bad", CHAT, **QUESTION), **change}
    rows = run_lines(tmp_path, llm, wrong, good, {**PARIS, "custom_id": "card"}, "{")
    assert expected in rows[0]["error"]["message"]
    assert rows[0]["response"]["status_code"] == 400
    choice = rows[1]["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == rows[2]["result"]["response"]
    assert choice["message"]["content"] == "The capital of France is Paris."
    assert "not JSON" in rows[3]["error"]


def test_a_stream_in_openai_s_format_is_answered_whole(tmp_path, llm):
    line = openai_line("a", CHAT, **QUESTION, temperature=0, stream=True)
    [row] = run_lines(tmp_path, llm, {**line, "priority": 1})
    assert row["ignored"] == ["priority", "body.stream"]
    assert row["response"]["body"]["object"] == "chat.completion"


def test_a_batch_in_openai_s_format_is_resumed(tmp_path, llm):
    """A line whose `error` is null has not failed."""
    lines = [openai_line(str(i), CHAT, **QUESTION, max_tokens=2, n=2) for i in range(4)]
    rows = run_lines(tmp_path, llm, *lines, openai_line("x", "/v1/none"))
    text = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    for kept in (2, 5):
        (tmp_path / "out").write_bytes(b"".join(text[:kept]))
        batch, steps, again = run((tmp_path / "in", tmp_path / "out"), llm)
        assert (steps, batch.failed) == (5 - kept, 1)
        assert [row["custom_id"] for row in again] == [row["custom_id"] for row in rows]


def test_openai_s_format_without_the_serve_extra_is_an_error_of_the_line(
    tmp_path, llm, monkeypatch
):
    monkeypatch.setitem(sys.modules, "llama_jax.server.openai", None)
    rows = run_lines(tmp_path, llm, openai_line("a", CHAT, **QUESTION), PARIS)
    assert "which is not installed; pip install 'llama_jax[serve]'" in rows[0]["error"]
    assert rows[1]["result"]["response"] == "The capital of France is Paris."


# Seeds of lines without one.


def seeds_of(rows):
    return [row["result"]["seed"] for row in rows]


def test_a_line_without_a_seed_gets_one_of_the_job_its_number_and_its_bytes(tmp_path, llm):
    line = {"prompt": "Hi", "max_tokens": 1}
    lines = [line, {**line, "seed": 7}, line, {"prompt": "Ho", "max_tokens": 1}]
    rows = run_lines(tmp_path, llm, *lines)
    first, given, same, other = seeds_of(rows)
    assert given == 7
    assert first == line_seed(0, 1, hashlib.sha256(json.dumps(line).encode()).hexdigest())
    assert first == 4796005747  # the rule is part of the format: files are continued
    assert same == line_seed(0, 3, rows[2]["sha256"])
    assert other == line_seed(0, 4, rows[3]["sha256"])
    assert seeds_of(run_lines(tmp_path, llm, *lines)) == [first, given, same, other]
    (tmp_path / "out").write_text("")
    with Batch(tmp_path / "in", tmp_path / "out", seed=1) as batch:
        list(batch.run(llm))
    others = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    first, given, same, other = seeds_of(others)
    assert given == 7
    assert (first, same) == tuple(line_seed(1, n, rows[0]["sha256"]) for n in (1, 3))


def test_a_body_of_openai_s_gets_a_seed_too(tmp_path, llm):
    lines = [
        {**openai_line(str(i), CHAT, **QUESTION, max_tokens=1, seed=seed), "priority": 1}
        for i, seed in enumerate([None, 5])
    ]
    rows = run_lines(tmp_path, llm, *lines)
    seeds = [row["response"]["body"]["choices"][0]["seed"] for row in rows]
    assert seeds == [line_seed(0, 1, rows[0]["sha256"]), 5]


def test_seeds_of_lines_are_in_the_card_s_range_and_differ():
    seeds = [line_seed(job, line, "ab") for job in range(100) for line in range(1, 101)]
    assert len(set(seeds)) == len(seeds)
    assert 1 <= min(seeds) < 10**8 < 9.9e9 < max(seeds) <= 9_999_999_999


@pytest.mark.parametrize("seed", [-1, 2**64, True])
def test_a_seed_of_the_job_out_of_range_is_refused(tmp_path, seed):
    with pytest.raises(InputError, match=r"seed is .*, expected a whole number from 0 to 2\^64"):
        Batch(tmp_path / "in", tmp_path / "out", seed=seed)
