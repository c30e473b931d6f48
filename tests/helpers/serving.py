"""The server in tests: an application around a model, and how to call it."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from llama_jax import Llama
from llama_jax.card import schemas as card
from llama_jax.server.app import create_app
from llama_jax.server.settings import Settings

MODEL = card.MODEL
NATIVE = "/client/v4/accounts/some-account/ai"
RUN = f"{NATIVE}/run/{MODEL}"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
COMMENT = ": keep-alive\n\n"
"""What a stream begins with, and what is sent in silences."""

ASKING = {"role": "user", "content": QUESTION}


def make_app(llm: Llama, **settings: Any) -> Starlette:
    """Return an application that compiles as it goes."""
    return create_app(llm, Settings(**{"warm_up": False, **settings}))


@contextlib.contextmanager
def serving(llm: Llama, **settings: Any) -> Iterator[TestClient]:
    """Run an application; one at a time for each model."""
    with TestClient(make_app(llm, **settings)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that is about to be so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come to be"
        time.sleep(0.002)


def events_of(text: str) -> list[Any]:
    """Return the parsed events of a whole stream, `[DONE]` as it is, without its comments."""
    assert text.startswith(COMMENT)
    assert text.endswith("\n\n")
    lines = text.replace(COMMENT, "").removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines), text
    values = [line.removeprefix("data: ") for line in lines]
    return [value if value == "[DONE]" else json.loads(value) for value in values]


@contextlib.contextmanager
def paused(llm: Llama) -> Iterator[None]:
    """Let the engine make no turn meanwhile."""
    with llm.engine._turn_lock:
        yield


class RawCall:
    """A request made of ASGI messages, whose client can disconnect at any moment."""

    def __init__(self, path: str, body: Any):
        self.hang_up = asyncio.Event()
        self.sent: list[Any] = []
        self.came = asyncio.Event()
        """Something of the answer's body has come."""
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def run(self, app: Starlette) -> None:
        """Have it answered."""
        await app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop()
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.came.set()
        await asyncio.sleep(0)


def native_usage(result):
    """Return what Workers AI's `usage` has of a result's."""
    usage = dataclasses.asdict(result.usage)
    del usage["cached_tokens"]
    return usage
