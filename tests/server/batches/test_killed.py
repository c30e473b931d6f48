"""A server of stored batches that is killed: the next one goes on."""

import json
import signal

import pytest

from tests.helpers.server_process import TOKEN, ServerProcess, served
from tests.helpers.serving import wait_until
from tests.helpers.stored_batches import chat_line, create, ended, openai

pytestmark = [pytest.mark.slow, pytest.mark.clients]

LINES = 200


def client_of(server: ServerProcess):
    return openai.OpenAI(api_key=TOKEN, base_url=f"{server.url}/v1", max_retries=0)


def test_a_batch_of_200_outlives_kill_9(tmp_path):
    before = "import functools, pathlib\n"
    before += "from llama_jax.server.batches.settings import BatchSettings\n"
    before += f"settings = BatchSettings(pathlib.Path({str(tmp_path)!r}))\n"
    before += "serve = functools.partial(serve, batches=settings)"
    lines = [chat_line(i, temperature=1.0) for i in range(LINES)]
    with served(before=before) as server:
        api = client_of(server)
        batch = create(api, lines)

        def completed():
            return api.batches.retrieve(batch.id).request_counts.completed

        wait_until(lambda: completed() >= LINES // 2, 300)
        server.process.send_signal(signal.SIGKILL)
        server.end()
    with served(before=before) as server:
        api = client_of(server)
        assert LINES // 2 <= api.batches.retrieve(batch.id).request_counts.completed < LINES
        done = ended(api, batch, 300)
        counts = {"total": LINES, "completed": LINES, "failed": 0}
        assert done.request_counts.model_dump() == counts
        text = api.files.content(done.output_file_id).text
        again = ended(api, create(api, lines), 300)
        other = api.files.content(again.output_file_id).text
    rows, others = ([json.loads(line) for line in each.splitlines()] for each in (text, other))
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in lines]
    assert len({row["id"] for row in rows}) == LINES
    for row, twin in zip(rows, others, strict=True):
        assert row["response"]["body"]["choices"] == twin["response"]["body"]["choices"]
