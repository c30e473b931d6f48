"""OpenAI's files and batches, by its own client and its own types."""

import pytest
from starlette.testclient import TestClient

from llama_jax.server.batches.settings import BatchSettings
from tests.helpers.serving import COMPLETIONS, MODEL, NATIVE, make_app, paused, serving, wait_until
from tests.helpers.stored_batches import (
    batching,
    chat_line,
    completion_line,
    create,
    ended,
    jsonl,
    openai,
    rows_of,
)

pytestmark = pytest.mark.clients


def content(row):
    return row["response"]["body"]["choices"][0]["message"]["content"]


def test_a_batch_is_answered_line_by_line(llm, tmp_path):
    """Also: errors have a file of their own, and the answers are those of the live route."""
    lines = [chat_line(i, seed=i + 1) for i in range(5)]
    lines[2]["body"]["temperature"] = 99
    lines[3]["body"] |= {"n": 2, "stream": True}
    with batching(llm, tmp_path) as (api, client):
        batch = create(api, lines, metadata={"name": "a"})
        assert batch.status == "validating"
        done = ended(api, batch)
        assert done.errors is None
        assert done.request_counts.model_dump() == {"total": 5, "completed": 4, "failed": 1}
        rows, errors = rows_of(api, done.output_file_id), rows_of(api, done.error_file_id)
        assert [row["custom_id"] for row in rows] == [f"line {i}" for i in (0, 1, 3, 4)]
        for row in rows:
            assert (row["error"], row["response"]["status_code"]) == (None, 200)
            index = int(row["custom_id"].split()[1])
            live = client.post(
                "/v1/chat/completions", json=lines[index]["body"] | {"stream": False}
            )
            choices = [choice["message"] for choice in row["response"]["body"]["choices"]]
            assert choices == [choice["message"] for choice in live.json()["choices"]]
        [error] = errors
        assert (error["custom_id"], error["response"]["status_code"]) == ("line 2", 400)
        assert "temperature" in error["error"]["message"]
        tokens = [row["response"]["body"]["usage"]["completion_tokens"] for row in rows]
        assert done.usage.output_tokens == sum(tokens)
        assert done.metadata == {"name": "a"}
        assert api.files.retrieve(done.output_file_id).purpose == "batch_output"
        metrics = client.get("/metrics").text
        assert 'llama_jax_num_batches{status="completed"} 1.0' in metrics
        assert 'llama_jax_batch_lines_total{end="failed"} 1.0' in metrics


def test_seeds_are_of_the_batch_and_the_line_not_of_the_run(demo, tmp_path):
    lines = [completion_line(i, temperature=1.0) for i in (1, 1, 2)]
    lines[1]["custom_id"] = "again"
    texts = []
    for folder, seed in (("a", 7), ("b", 7), ("c", 8)):
        with batching(demo(), tmp_path / folder) as (api, _):
            done = ended(api, create(api, lines, seed=seed, endpoint=COMPLETIONS))
            texts.append(
                [r["response"]["body"]["choices"] for r in rows_of(api, done.output_file_id)]
            )
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len({row[0]["seed"] for row in texts[0]}) == 3


@pytest.mark.parametrize(
    ("lines", "code", "line"),
    [
        ([chat_line(1), chat_line(1)], "duplicate_custom_id", 2),
        ([chat_line(1), "{"], "invalid_json_line", 2),
        ([chat_line(1), "", "5"], "invalid_json_line", 3),
        ([completion_line(1)], "mismatched_url", 1),
        ([chat_line(1) | {"method": "GET"}], "invalid_method", 1),
        ([chat_line(1) | {"body": 5}], "missing_body", 1),
        ([chat_line(1) | {"custom_id": None}], "missing_custom_id", 1),
        ([chat_line(i) for i in range(9)], "too_many_requests", 9),
        ([""], "empty_file", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_input_fails_as_a_whole(llm, tmp_path, lines, code, line):
    with batching(llm, tmp_path, max_requests=8) as (api, _):
        failed = ended(api, create(api, lines))
        assert failed.status == "failed"
        assert [(each.code, each.line) for each in failed.errors.data] == [(code, line)]
        assert failed.request_counts.completed == 0


def test_what_is_wrong_with_a_request_is_named(llm, tmp_path):
    with batching(llm, tmp_path, max_file_bytes=100) as (api, client):
        file = api.files.create(file=("a", b"x"), purpose="batch")
        for fields in (
            {"completion_window": "1h"},
            {"endpoint": "/v1/embeddings"},
            {"metadata": {"a": "b" * 513}},
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            {"extra_body": {"priority": 3}},
        ):
            given = {"endpoint": "/v1/completions", "completion_window": "24h", **fields}
            with pytest.raises(openai.BadRequestError) as caught:
                api.batches.create(input_file_id=file.id, **given)
            [name] = fields if "extra_body" not in fields else ["priority"]
            assert name in str(caught.value)
        for missing in (api.files.retrieve, api.files.delete, api.files.content):
            with pytest.raises(openai.NotFoundError, match="file-none"):
                missing("file-none")
        with pytest.raises(openai.NotFoundError, match="batch_none"):
            api.batches.retrieve("batch_none")
        with pytest.raises(openai.NotFoundError, match="file-none"):
            api.batches.create(
                input_file_id="file-none", endpoint="/v1/completions", completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError, match="purpose is 'vision'"):
            api.files.create(file=("a", b"x"), purpose="vision")
        with pytest.raises(openai.BadRequestError, match="101 bytes, expected at most 100"):
            api.files.create(file=("a", b"x" * 101), purpose="batch")
        with pytest.raises(openai.APIStatusError) as caught:
            api.files.create(file=("a", b"x" * 10**6), purpose="batch")
        assert caught.value.status_code == 413
        assert client.post("/v1/files", json={}).status_code == 400
        assert client.post("/v1/files", data={"purpose": "batch"}).status_code == 400
        assert client.get("/v1/files?limit=0").status_code == 400
        assert client.get("/v1/batches?limit=101").status_code == 400


def test_files_are_listed_in_pages_and_deleted(llm, tmp_path):
    with batching(llm, tmp_path) as (api, client):
        ids = [api.files.create(file=(f"{i}", b"x\n"), purpose="batch").id for i in range(3)]
        assert [file.id for file in api.files.list(limit=2)] == ids[::-1]
        assert [file.id for file in api.files.list(order="asc", after=ids[0])] == ids[1:]
        assert list(api.files.list(purpose="batch_output")) == []
        kept = {"anchor": "created_at", "seconds": 3600}
        file = api.files.create(file=("f", b"x"), purpose="batch", expires_after=kept)
        assert file.expires_at == file.created_at + 3600
        assert api.files.delete(ids[1]).deleted
        assert api.files.content(ids[0]).content == b"x\n"
        assert client.get(f"{NATIVE}/v1/files/{ids[0]}").json()["id"] == ids[0]
        assert len(list((tmp_path / "files").iterdir())) == 3
        with paused(llm):
            batches = [create(api, [chat_line(1)]) for _ in range(3)]
            assert [each.id for each in api.batches.list(limit=2)] == [b.id for b in batches[::-1]]
            with pytest.raises(openai.ConflictError, match=f"is the input of {batches[0].id}"):
                api.files.delete(batches[0].input_file_id)


def test_a_batch_that_is_cancelled_keeps_what_is_answered(llm, tmp_path):
    lines = [chat_line(i) for i in range(4)]
    lines += [chat_line(i, max_tokens=400, ignore_eos=True) for i in range(4, 40)]
    with batching(llm, tmp_path) as (api, _):
        batch = create(api, lines)
        wait_until(lambda: api.batches.retrieve(batch.id).request_counts.completed >= 4)
        assert api.batches.cancel(batch.id).status == "cancelling"
        done = ended(api, batch)
        assert done.status == "cancelled"
        assert done.cancelled_at >= done.cancelling_at
        wait_until(lambda: llm.engine.background == (0, 0))
        rows = rows_of(api, done.output_file_id)
        assert 4 <= len(rows) == done.request_counts.completed < 40
        assert done.error_file_id is None
        assert api.batches.cancel(batch.id).status == "cancelled"
        other = ended(api, create(api, [chat_line(1)]))
        with pytest.raises(openai.ConflictError, match="is completed, expected a batch that has"):
            api.batches.cancel(other.id)


def test_live_requests_come_first_and_the_gauges_do_not_count_batches(llm, tmp_path):
    lines = [chat_line(i, max_tokens=200, ignore_eos=True) for i in range(8)]
    with batching(llm, tmp_path) as (api, client):
        batch = create(api, lines)
        wait_until(lambda: llm.engine.background[0] == 4)
        text = client.get("/metrics").text
        assert "llama_jax_num_requests_running 0.0" in text
        assert "llama_jax_num_requests_waiting 0.0" in text
        assert "llama_jax_num_batch_generations_running 4.0" in text
        body = {"model": MODEL, "prompt": ["x"] * 4, "max_tokens": 2, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert api.batches.retrieve(batch.id).status == "in_progress"
        done = ended(api, batch)
        assert done.request_counts.completed == 8


def test_without_a_folder_the_routes_say_how_to_get_one(llm):
    with serving(llm) as client:
        for method, path in (
            *(("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/batches")),
            *(("POST", "/v1/batches"), ("POST", f"{NATIVE}/run/{MODEL}?queueRequest=true")),
        ):
            response = client.request(method, path, json={})
            assert response.status_code == 404
            assert "--batch_dir=FOLDER" in response.json()["error"]["message"]


def test_the_token_guards_files_and_batches(llm, tmp_path):
    app = make_app(llm, api_token="secret", batches=BatchSettings(tmp_path))
    with TestClient(app) as client:
        for path in ("/v1/files", "/v1/batches", "/v1/files/a/content", "/v1/batches/a"):
            assert client.get(path).status_code == 401
        upload = {"file": ("a", jsonl([chat_line(1)]))}
        assert client.post("/v1/files", files=upload).status_code == 401
        known = {"authorization": "Bearer secret"}
        assert client.get("/v1/files", headers=known).json()["data"] == []
