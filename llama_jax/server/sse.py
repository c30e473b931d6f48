"""Server-sent events: an answer sent as it comes."""

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
    call: RequestLog, events: Events, requests: Sequence[GenerationRequest]
) -> "EventStream":
    """Wait for the first event: what goes wrong before it is an ordinary error."""
    seeds = [request.parameters.seed for request in requests]
    return EventStream(_tell_errors(call, await anext(events), events), seeds)


async def _tell_errors(call: RequestLog, first: bytes, events: Events) -> Events:
    """Pass events on; an error in their midst is the last one, and there is no [DONE]."""
    async with contextlib.aclosing(events):
        yield first
        try:
            async for data in events:
                yield data
        except Exception as error:
            yield event(call.fail(error).body(call.id))


class EventStream(Response):
    """Events, each sent as soon as it is there.

    Nothing here watches for a client that hangs up: the gate does, and cancels this.

    Args:
        events: in the bytes that are to be sent.
        seeds: of the answers; a client that hangs up too early for an answer's last event, which
            tells it, has it from the headers.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, seeds: Sequence[int]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers | {"x-seed": ",".join(map(str, seeds))})
        del self.headers["content-length"]  # nobody knows yet
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        async with contextlib.aclosing(self._events):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
