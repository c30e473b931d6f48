"""Stored batches in tests: lines of input, and OpenAI's client of a server in this process."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama_jax import Llama
from llama_jax.server.batches.settings import BatchSettings
from tests.helpers.serving import CHAT, COMPLETIONS, MODEL, serving, wait_until

openai: Any = pytest.importorskip(
    "openai", reason="needs OpenAI's client: pip install -e '.[clients]'"
)

ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(number: int, **fields: Any) -> dict[str, Any]:
    """Return a line of a chat completion."""
    question = {"role": "user", "content": f"Tell me tale {number}."}
    body = {"model": MODEL, "messages": [question], "max_tokens": 6, **fields}
    return {"custom_id": f"line {number}", "method": "POST", "url": CHAT, "body": body}


def completion_line(number: int, **fields: Any) -> dict[str, Any]:
    """Return a line of a completion."""
    body = {"model": MODEL, "prompt": f"Once upon {number}", "max_tokens": 6, **fields}
    return {"custom_id": f"line {number}", "method": "POST", "url": COMPLETIONS, "body": body}


def jsonl(lines: list[Any]) -> bytes:
    """Return lines as a file; text is used as it is."""
    return "".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
    ).encode()


@contextlib.contextmanager
def batching(llm: Llama, folder: pathlib.Path, **settings: Any) -> Iterator[tuple[Any, TestClient]]:
    """Serve a model with a folder of batches; give OpenAI's client of it, and the plain one."""
    with serving(llm, batches=BatchSettings(folder, **settings)) as client:
        base_url = "http://testserver/v1"
        yield (
            openai.OpenAI(api_key="x", base_url=base_url, http_client=client, max_retries=0),
            client,
        )


def create(api: Any, lines: list[Any], **fields: Any) -> Any:
    """Upload lines, and create a batch of them."""
    file = api.files.create(file=("input.jsonl", jsonl(lines)), purpose="batch")
    seed = fields.pop("seed", 7)
    options: Any = {"endpoint": CHAT, "completion_window": "24h", **fields}
    return api.batches.create(input_file_id=file.id, extra_body={"seed": seed}, **options)


def ended(api: Any, batch: Any, seconds: float = 120) -> Any:
    """Wait for a batch's end."""
    wait_until(lambda: api.batches.retrieve(batch.id).status in ENDED, seconds)
    return api.batches.retrieve(batch.id)


def rows_of(api: Any, file_id: str | None) -> list[Any]:
    """Return the rows of a file; none if there is no file."""
    if file_id is None:
        return []
    return [json.loads(line) for line in api.files.content(file_id).text.splitlines()]
