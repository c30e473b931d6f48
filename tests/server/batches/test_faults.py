"""What goes wrong around stored batches: nothing is lost, answered twice, or stops the others."""

import asyncio
import errno
import sqlite3

import pytest

from llama_jax.errors import InputError
from llama_jax.server import middleware
from llama_jax.server.batches import worker
from llama_jax.server.batches.folder import Folder
from llama_jax.server.openai import files
from tests.helpers.serving import COMPLETIONS, MODEL, paused, serving, wait_until
from tests.helpers.stored_batches import batching, chat_line, create, ended, openai, rows_of

pytestmark = pytest.mark.clients

LONG = {"max_tokens": 300, "ignore_eos": True}
POISON = {1: 667, 2: 668, 7: 673}  # seeds of lines; the last is followed by lines not begun


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(worker, "_SWEEP_S", 0.05)
    monkeypatch.setattr(worker, "_RETRY_S", 0.05)


def lines_of(folder):
    """Return what the database says of all lines: number, attempts, done."""
    with sqlite3.connect(folder / "batches.sqlite") as connection:
        return connection.execute("SELECT number, attempts, done FROM lines").fetchall()


def seed_of(slot):
    return slot.generation.request.parameters.seed


def choices(rows):
    return {row["custom_id"]: row["response"]["body"]["choices"] for row in rows}


def test_lines_that_make_the_engine_fail_get_an_error_and_end_nothing_else(
    llm, tmp_path, monkeypatch
):
    """Also those whose slots fail with them are answered, and the server goes on."""
    pipeline = llm.engine._scheduler.pipeline
    decode, neighbours = pipeline.decode, {}

    def poisoned(slots, steps):
        if seeds := [s for s in map(seed_of, slots) if s in POISON.values()]:
            in_use = sum(slot.generation is not None for slot in llm.engine._scheduler.slots)
            for seed in seeds:
                neighbours.setdefault(seed, []).append(in_use - 1)
            raise RuntimeError("poison")
        decode(slots, steps)

    monkeypatch.setattr(pipeline, "decode", poisoned)
    lines = [chat_line(i, ignore_eos=True) for i in range(12)]
    for i, seed in POISON.items():
        lines[i]["body"]["seed"] = seed
    with batching(llm, tmp_path) as (api, client):
        done = ended(api, create(api, lines))
        assert done.status == "completed"
        errors = rows_of(api, done.error_file_id)
        assert [row["custom_id"] for row in errors] == ["line 1", "line 2", "line 7"]
        assert {row["error"]["code"] for row in errors} == {"server_error"}
        assert done.request_counts.completed == 9
        assert [tries[-1] for tries in neighbours.values()] == [0, 0, 0]  # alone at the second
        assert not client.app.state.service.failed
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        assert client.post(COMPLETIONS, json=body).status_code == 200


def test_a_stop_breaks_lines_off_and_the_next_start_answers_them_alike(demo, tmp_path):
    lines = [chat_line(i, temperature=1.0, **LONG) for i in range(8)]
    llm = demo()
    with batching(llm, tmp_path / "a") as (api, _):
        batch = create(api, lines)
        wait_until(lambda: llm.engine.background[0] == 4)
    counted = lines_of(tmp_path / "a")
    assert len(counted) == 8
    assert all(done or not attempts for _, attempts, done in counted)
    assert not all(done for *_, done in counted)
    with batching(demo(), tmp_path / "a") as (api, _), batching(demo(), tmp_path / "b") as (two, _):
        done, other = ended(api, batch), ended(two, create(two, lines))
        assert done.request_counts.completed == 8
        rows, others = rows_of(api, done.output_file_id), rows_of(two, other.output_file_id)
        assert choices(rows) == choices(others)


def test_a_line_that_was_begun_twice_is_not_begun_again(demo, tmp_path):
    lines = [chat_line(i, **LONG) for i in range(3)]
    llm = demo()
    with batching(llm, tmp_path) as (api, _), paused(llm):
        batch = create(api, lines)
        wait_until(lambda: api.batches.retrieve(batch.id).status == "in_progress")
        worker_ = llm_worker(api)
        worker_.stop()
    with sqlite3.connect(tmp_path / "batches.sqlite") as connection:
        connection.execute("UPDATE lines SET attempts = number")  # 1 and 2: as if killed
        connection.execute("UPDATE lines SET attempts = 0 WHERE number = 3")
    with batching(demo(), tmp_path) as (api, _):
        done = ended(api, batch)
        [error] = rows_of(api, done.error_file_id)
        assert (error["custom_id"], error["error"]["code"]) == ("line 1", "server_error")
        rows = rows_of(api, done.output_file_id)
        assert [row["custom_id"] for row in rows] == ["line 0", "line 2"]


def llm_worker(api):
    return api._client.app.state.service.batches.worker


def test_a_damaged_or_missing_file_is_the_error_of_its_own_lines(llm, tmp_path, monkeypatch):
    with batching(llm, tmp_path) as (api, _):
        with paused(llm):
            batch = create(api, [chat_line(i) for i in range(9)])
            wait_until(lambda: sum(attempts for _, attempts, _ in lines_of(tmp_path)) == 4)
            path = tmp_path / "files" / batch.input_file_id
            path.write_bytes(b"\0" * path.stat().st_size)
        damaged = ended(api, batch)
        codes = [row["error"]["code"] for row in rows_of(api, damaged.error_file_id)]
        assert codes == ["unreadable_line"] * 5
        assert damaged.request_counts.completed == 4
        read = Folder.lines

        def lines(self, file_id, longest):
            if file_id == gone.input_file_id:
                raise OSError(errno.EIO, "Input/output error")
            return read(self, file_id, longest)

        with paused(llm):
            first = create(api, [chat_line(0)])
            wait_until(lambda: api.batches.retrieve(first.id).status == "in_progress")
            gone = first
            monkeypatch.setattr(Folder, "lines", lines)
            again = api.batches.create(
                input_file_id=first.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
            failed = ended(api, again)
        assert [problem.code for problem in failed.errors.data] == ["unreadable_file"]
        assert ended(api, first).status == ended(api, create(api, [chat_line(1)])).status
        (tmp_path / "files" / damaged.error_file_id).unlink()
        with pytest.raises(openai.NotFoundError):
            api.files.content(damaged.error_file_id)
        api.files.delete(damaged.error_file_id)


def test_what_has_expired_frees_the_disk(llm, tmp_path):
    with batching(llm, tmp_path, max_stored_bytes=1500, keep_s=2) as (api, _):
        done = ended(api, create(api, [chat_line(0)]))
        with pytest.raises(openai.APIStatusError) as caught:
            api.files.create(file=("a", b"x" * 1000), purpose="batch")
        assert caught.value.status_code == 507
        wait_until(lambda: not list((tmp_path / "files").iterdir()))
        with pytest.raises(openai.NotFoundError):
            api.files.content(done.output_file_id)
        wait_until(lambda: not list(api.batches.list()))
        api.files.create(file=("a", b"x" * 1000), purpose="batch")


def test_lines_left_when_the_window_closes_are_errors(llm, tmp_path):
    lines = [chat_line(i) for i in range(2)] + [chat_line(i, **LONG) for i in range(2, 60)]
    with batching(llm, tmp_path, window_s=2) as (api, client):
        done = ended(api, create(api, lines))
        assert done.status == "expired"
        wait_until(lambda: llm.engine.background == (0, 0))
        rows, errors = rows_of(api, done.output_file_id), rows_of(api, done.error_file_id)
        assert len(rows) + len(errors) == 60
        assert {(row["response"], row["error"]["code"]) for row in errors} == {
            (None, "batch_expired")
        }
        assert 'llama_jax_num_batches{status="expired"} 1.0' in client.get("/metrics").text


def test_a_full_disk_delays_the_end_of_a_batch(llm, tmp_path, monkeypatch):
    write, failures = Folder.write, []

    def full(self, file_id, parts):
        if len(failures) < 3 and file_id != upload.id:
            failures.append(file_id)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, file_id, parts)

    with batching(llm, tmp_path) as (api, _):
        with paused(llm):
            batch = create(api, [chat_line(0)])
            upload = api.files.retrieve(batch.input_file_id)
            monkeypatch.setattr(Folder, "write", full)
        assert len(rows_of(api, ended(api, batch).output_file_id)) == 1
        assert len(failures) == 3


def test_a_download_may_take_longer_than_a_request(llm, tmp_path, monkeypatch):
    async def slowly(file):
        with file:
            while part := file.read(1):
                yield part
                await asyncio.sleep(0.1)

    with batching(llm, tmp_path) as (api, client):
        file = api.files.create(file=("a", b"0123456789"), purpose="batch")
        monkeypatch.setattr(files, "_parts", slowly)
        monkeypatch.setattr(middleware, "_READING_S", -599.5)
        assert client.get(f"/v1/files/{file.id}/content").content == b"0123456789"


def refused(llm, folder, text):
    """Check that a server refuses a folder."""
    with pytest.raises(InputError, match=text), batching(llm, folder):
        raise AssertionError("it was not refused")


def test_a_folder_is_of_one_server_and_no_other_program_s(demo, tmp_path):
    with batching(demo(), tmp_path):
        refused(demo(), tmp_path, "is in use by another server")
    (tmp_path / "batches.sqlite").write_bytes(b"something else" * 100)
    refused(demo(), tmp_path, "cannot be used")
    with serving(demo()) as client:
        assert client.get("/v1/files").status_code == 404
