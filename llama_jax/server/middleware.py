"""RequestMiddleware: authentication, body limit, time limits, errors and log of every request.

It opens a log for the request, checks the client's token and page, reads the body and runs the
route as long as the client is connected. Every error becomes a response of the same form. At the
end the request is logged and counted.
"""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.server import errors
from llama_jax.server.auth import OPEN_PATHS, check_page, check_token
from llama_jax.server.batches.settings import QUEUE_BYTES
from llama_jax.server.body import DisconnectedError, read_part
from llama_jax.server.body_budget import BodyBudget, BodyShare
from llama_jax.server.errors import ApiError
from llama_jax.server.request_log import RequestLog
from llama_jax.server.settings import Settings
from llama_jax.server.transfers import FORM, Uploads, is_download, patient

_READING_S = 60
"""Time beyond the time limit that a client has to read its response."""

BODY_S = 120.0
"""For a whole body: 8 MiB at 0.6 Mbit/s."""

_DISCARDED = 4
"""A body up to this multiple of the limit is read to its end before it is refused."""


class RequestMiddleware:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        settings: the server's settings.
        budget: where the bodies are counted.
        on_end: called with the log of each request when it has ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        budget: BodyBudget,
        on_end: Callable[[RequestLog], None],
    ):
        self._app, self._settings = app, settings
        self._budget, self._on_end = budget, on_end
        batches = settings.batches
        self._uploads = None if batches is None else Uploads(batches.max_file_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        address, _port = scope.get("client") or ("", 0)
        log = RequestLog(scope["method"], scope["path"], address)
        log.record_session(Headers(scope=scope))
        scope["llama_jax.log"] = log

        async def send_logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = log.id
                if log.receipt_ids and log.error is None:
                    headers["x-receipt-id"] = ",".join(log.receipt_ids)
            await send(message)

        try:
            with self._budget.share() as share:
                await self._respond(scope, receive, send_logged, share)
        except DisconnectedError:
            log.disconnected = True
        except Exception as error:
            log.fail(error)
            if log.status is None:
                await log.error_reply()(scope, receive, send_logged)
            elif not isinstance(error, TimeoutError):
                raise  # the response has begun: it can only be cut off
            # Its frames hold the body and, through the log, the error itself: a cycle, which would
            # keep the body until the next garbage collection.
            error.__traceback__ = error.__context__ = None
        finally:
            endpoint = scope.get("endpoint")
            log.route = getattr(endpoint, "__name__", log.route)
            self._on_end(log)
        return None

    async def _respond(self, scope: Scope, receive: Receive, send: Send, share: BodyShare) -> None:
        if (refusal := scope.get(errors.REFUSAL)) is not None:
            raise refusal
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS:
            if self._settings.local_only:
                check_page(headers, self._settings.allowed_origins)
            check_token(headers, self._settings.api_token)
        if self._uploads is not None and self._uploads.takes(scope):
            return await self._respond_to_upload(self._uploads, scope, receive, send)
        try:
            async with asyncio.timeout(min(self._settings.timeout_s, BODY_S)):
                body = await _read_body(scope, receive, self._max_body_bytes(scope), share)
        except TimeoutError:
            raise ApiError(errors.TIMEOUT, headers={"connection": "close"}) from None
        await self._run(scope, _replay(body, receive), send, receive)
        return None

    async def _respond_to_upload(
        self, uploads: Uploads, scope: Scope, receive: Receive, send: Send
    ) -> None:
        form = await uploads.read(scope, receive)
        try:
            scope[FORM] = form
            await self._run(scope, _replay(b"", receive), send, receive)
        finally:
            await form.close()

    async def _run(self, scope: Scope, replay: Receive, send: Send, receive: Receive) -> None:
        """Run the route. The generation has its own deadline; these are for slow readers."""
        seconds: float | None = self._settings.timeout_s + _READING_S
        if is_download(scope):
            send, seconds = patient(send, seconds), None
        async with asyncio.timeout(seconds):
            await _while_connected(self._app(scope, replay, send), receive)

    def _max_body_bytes(self, scope: Scope) -> int:
        """Return the most bytes of a body; those of Workers AI's queue are its own."""
        most = self._settings.max_body_bytes
        if self._settings.batches is not None and b"queueRequest=" in scope["query_string"]:
            return max(most, QUEUE_BYTES)
        return most


async def _read_body(scope: Scope, receive: Receive, limit: int, share: BodyShare) -> bytes:
    """Read a body up to the limit, and count it.

    The rest of a larger body is read and discarded, unless it is very large. A client that is still
    writing when the connection closes may never read the error.

    Raises:
        TimeoutError: nothing came for too long.
        ApiError: it is too large, or there is no room for it beside the others.
    """
    headers = Headers(scope=scope)
    refusal = ApiError(errors.TOO_LARGE, headers={"connection": "close"})
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > (limit if "expect" in headers else _DISCARDED * limit):
        raise refusal
    body, size, more = bytearray(), 0, True
    while more:
        part, more = await read_part(scope, receive)
        size += len(part)
        if size <= limit:
            share.take(len(part))
            body += part
        elif size > _DISCARDED * limit:
            raise refusal
        else:
            body.clear()
            share.release()
    if size > limit:
        raise refusal
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body already read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


async def _while_connected(response: Awaitable[None], receive: Receive) -> None:
    """Await a response, and cancel it as soon as the client disconnects.

    Raises:
        DisconnectedError: the client disconnected.
        Exception: what the response raised.
    """
    task = asyncio.ensure_future(response)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        finished = task.done()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)
    if not finished:
        raise DisconnectedError
    await task


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
