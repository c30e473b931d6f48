"""RequestMiddleware: what every request passes, whatever it asks for.

In this order: a call is made for it, who sends it is checked, its body is read, and it is answered
for as long as its client is there. Whatever goes wrong is told the client in one form, and the call
is logged and counted at the end.
"""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.server import errors
from llama_jax.server.auth import OPEN_PATHS, check_page, check_token
from llama_jax.server.errors import ApiError
from llama_jax.server.request_log import RequestLog
from llama_jax.server.settings import Settings

_READING_S = 60
"""How much longer than the time limit a client may take to read its answer."""

_THROWN_AWAY = 4
"""How often its limit a body may hold if it is to be read to its end before it is refused."""


class ClientDisconnectedError(Exception):
    """The client went away."""


class RequestMiddleware:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        settings: the server's.
        on_end: called with each call when it is over.
    """

    def __init__(self, app: ASGIApp, settings: Settings, on_end: Callable[[RequestLog], None]):
        self._app, self._settings, self._on_end = app, settings, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        call = RequestLog(scope["method"], scope["path"])
        scope["llama_jax.call"] = call

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = call.id
            await send(message)

        try:
            await self._answer(scope, receive, send_noting)
        except ClientDisconnectedError:
            call.disconnected = True
        except Exception as error:
            refusal = call.fail(error)
            if call.status is None:
                await refusal.reply(call.id)(scope, receive, send_noting)
            elif not isinstance(error, TimeoutError):
                raise  # in the midst of an answer: all there is to do is to break it off
        finally:
            endpoint = scope.get("endpoint")
            call.route = getattr(endpoint, "__name__", call.route)
            self._on_end(call)
        return None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS:
            if self._settings.local_only:
                check_page(headers, self._settings.allowed_origins)
            check_token(headers, self._settings.api_token)
        async with asyncio.timeout(self._settings.timeout_s):
            body = await _read_body(headers, receive, self._settings.max_body_bytes)
        # The answer has its own deadline; this is for a client that does not read it.
        async with asyncio.timeout(self._settings.timeout_s + _READING_S):
            await _while_connected(self._app(scope, _replay(body, receive), send), receive)


async def _read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """Read a body up to the limit.

    Of one too large the rest is read too, unless it is very large, and thrown away: a client that
    still writes when the connection ends may never read why.
    """
    refusal = ApiError(errors.TOO_LARGE, headers={"connection": "close"})
    said = headers.get("content-length", "")
    if said.isdecimal() and int(said) > (limit if "expect" in headers else _THROWN_AWAY * limit):
        raise refusal
    body, size, more = bytearray(), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        part = message.get("body", b"")
        size += len(part)
        more = message.get("more_body", False)
        if size <= limit:
            body += part
        elif size > _THROWN_AWAY * limit:
            raise refusal
        else:
            body.clear()
    if size > limit:
        raise refusal
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body which was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replaying() -> Message:
        return messages.pop() if messages else await receive()

    return replaying


async def _while_connected(answering: Awaitable[None], receive: Receive) -> None:
    """Await an answer, and cancel it as soon as its client hangs up.

    Raises:
        ClientDisconnectedError: it did.
        Exception: what the answer raised.
    """
    answer = asyncio.ensure_future(answering)
    hang_up = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((answer, hang_up), return_when=asyncio.FIRST_COMPLETED)
        over = answer.done()
    finally:
        answer.cancel()
        hang_up.cancel()
        await asyncio.gather(answer, hang_up, return_exceptions=True)
    if not over:
        raise ClientDisconnectedError
    await answer


async def _hang_up(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
