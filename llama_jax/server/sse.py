"""Server-sent events: streamed responses."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.server.answers import Answers
from llama_jax.server.compact_json import encode
from llama_jax.server.request_log import RequestLog

Events = AsyncGenerator[bytes, None]

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"


def event(value: Any) -> bytes:
    """Return one event."""
    return b"data: " + encode(value) + b"\n\n"


class EventStream(Response):
    """A stream that sends each event as soon as it exists, and comments in silences.

    The headers and a first comment are sent at once: a request that waits for its slot, or whose
    prompt is read, is not taken for dead. So an error from then on is the last event, and no [DONE]
    follows. `RequestMiddleware` cancels it when the client disconnects.

    Args:
        log: the request's.
        answers: the generations; whatever ends the stream, what is left of them is cancelled. The
            header `x-seed` holds the seed of each. It is also in the choice's last event, which a
            client that stops the stream does not read.
        events: encoded events.
        keep_alive_s: silence after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, log: RequestLog, answers: Answers, events: Events, keep_alive_s: float):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers | {"x-seed": ",".join(map(str, answers.seeds))})
        del self.headers["content-length"]  # unknown until the end
        self._answers, self._keep_alive_s = answers, keep_alive_s
        self._events = _with_errors(log, events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        scope["llama_jax.comment"] = _COMMENT  # for the connection to ask whether a client is there
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async with contextlib.aclosing(_keep_alive(self._events, self._keep_alive_s)) as parts:
                async for data in parts:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._answers.cancel()  # events that were never begun cannot do it


async def _with_errors(log: RequestLog, events: Events) -> Events:
    """Pass events on; an error becomes the last event."""
    async with contextlib.aclosing(events):
        try:
            async for data in events:
                yield data
        except Exception as error:
            log.fail(error)
            yield event(log.error_body())


async def _keep_alive(events: Events, seconds: float) -> Events:
    """Pass events on; yield a comment first, and whenever none came for so long."""
    yield _COMMENT
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            await asyncio.wait((waiting,), timeout=seconds)
            if not waiting.done():
                yield _COMMENT
                continue
            try:
                data = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield data
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await events.aclose()
