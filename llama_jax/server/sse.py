"""Server-sent events: streamed responses."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.engine.request import GenerationRequest
from llama_jax.server.compact_json import encode
from llama_jax.server.request_log import RequestLog

Events = AsyncGenerator[bytes, None]

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """Return one event."""
    return b"data: " + encode(value) + b"\n\n"


async def start_stream(
    log: RequestLog, events: Events, requests: Sequence[GenerationRequest]
) -> "EventStream":
    """Wait for the first event, so that an error before it is an ordinary error response."""
    seeds = [request.parameters.seed for request in requests]
    return EventStream(_with_errors(log, await anext(events), events), seeds)


async def _with_errors(log: RequestLog, first: bytes, events: Events) -> Events:
    """Pass events on; an error becomes the last event, and no [DONE] follows."""
    async with contextlib.aclosing(events):
        yield first
        try:
            async for data in events:
                yield data
        except Exception as error:
            yield event(log.fail(error).body(log.id))


class EventStream(Response):
    """A stream that sends each event as soon as it exists.

    `RequestMiddleware` cancels it when the client disconnects.

    Args:
        events: encoded events.
        seeds: the seed of each choice, for the header `x-seed`. The seed is also in the choice's
            last event, which a client that stops the stream does not read.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, seeds: Sequence[int]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers | {"x-seed": ",".join(map(str, seeds))})
        del self.headers["content-length"]  # unknown until the end
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with contextlib.aclosing(self._events):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
