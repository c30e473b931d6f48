"""Hostile clients, over bare sockets: they stall, trickle, idle, half-close, hang up and crowd."""

import asyncio
import collections
import contextlib
import http.client
import io
import json
import random
import socket
import struct
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable

from tools.soak.acts import Acts
from tools.soak.answers import Known, WrongAnswerError
from tools.soak.server import TOKEN

CROWD = 100
"""Connections that one client opens at once; with all others they are more than the limit."""
SLACK_S = 15
"""Beyond the server's own deadlines."""
HEAD_S, SILENCE_S, BODY_S, IDLE_S = 10, 30, 120, 75
"""Those deadlines: docs/reliability.md, Connections."""
_RESET = struct.pack("ii", 1, 0)


class Hostile:
    """One hostile client, which does one thing after the other.

    Args:
        url: the server's.
        address: its own.
        known: requests whose answers are known.
        rng: decides what it does.
        counts: what it did and got, by name; shared.
    """

    def __init__(
        self,
        url: str,
        address: str,
        known: list[Known],
        rng: random.Random,
        counts: collections.Counter[str],
    ):
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._address, self._known, self._rng, self._counts = address, known, rng, counts
        weights: dict[Callable[[], Awaitable[None]], float] = {
            self.stalled_head: 2,
            self.stalled_body: 2,
            self.trickled_head: 2,
            self.trickled_body: 0.5,
            self.silent: 2,
            self.idle: 0.5,
            self.half_closed: 6,
            self.hung_up: 6,
            self.crowd: 0.1,
        }
        # The server closes connections to make room for others.
        self.acts = Acts(weights, rng, counts, (ConnectionError, asyncio.IncompleteReadError))

    async def stalled_head(self) -> None:
        """Send a part of a head, and wait."""
        head, _ = self._request()
        async with self._connected(head[: self._rng.randrange(1, len(head))]) as (reader, _):
            await self._is_refused(reader, HEAD_S)

    async def stalled_body(self) -> None:
        """Send a part of a body, and wait."""
        head, body = self._request()
        start = head + body[: self._rng.randrange(len(body))]
        async with self._connected(start) as (reader, _):
            await self._is_refused(reader, SILENCE_S)

    async def trickled_head(self) -> None:
        """Send a head byte by byte."""
        head, _ = self._request()
        await self._trickle(b"", head, 0.5, HEAD_S)

    async def trickled_body(self) -> None:
        """Send a body byte by byte."""
        head, body = self._request()
        body += b" " * 200
        await self._trickle(head.replace(b"length: ", b"length: 9"), body, 1, BODY_S)

    async def silent(self) -> None:
        """Send nothing."""
        async with self._connected(b"") as (reader, _):
            await self._is_refused(reader, HEAD_S)

    async def idle(self) -> None:
        """Send nothing more after an answer."""
        request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
        async with self._connected(request) as (reader, _):
            async with asyncio.timeout(IDLE_S + SLACK_S):
                if not (await reader.read()).endswith(b"ok\n"):
                    raise WrongAnswerError("no ok")

    async def half_closed(self) -> None:
        """Close the direction that is not needed any more; the whole answer must come."""
        known = self._rng.choice(self._known)
        async with self._connected(b"".join(self._request(known))) as (reader, writer):
            writer.write_eof()
            response = _parsed(await reader.read())
        self._counts[f"half_closed: {response.status}"] += 1
        if response.status != http.client.TOO_MANY_REQUESTS:
            known.check(response.status, response.read())

    async def hung_up(self) -> None:
        """Send a part or the whole of a request, wait or not, and be gone."""
        request = b"".join(self._request())
        cut = self._rng.choice([len(request), self._rng.randrange(len(request))])
        async with self._connected(request[:cut]) as (_, writer):
            await asyncio.sleep(self._rng.choice([0, self._rng.uniform(0, 0.1)]))
            if self._rng.random() < 0.5:
                end: socket.socket = writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    async def crowd(self) -> None:
        """Open many connections at once, with a request or without."""

        async def one(request: bytes) -> None:
            try:
                async with self._connected(request) as (reader, _):
                    async with asyncio.timeout(HEAD_S + SLACK_S):
                        data = await reader.read()
            except ConnectionError:
                data = b""
            self._counts[f"crowd: {'answered' if data else 'closed'}"] += 1
            if data and not (request and data.endswith(b"ok\n")):
                raise WrongAnswerError(f"{data!r:.80}")

        request = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        await asyncio.gather(*(one(request if i % 2 else b"") for i in range(CROWD)))

    def _request(self, known: Known | None = None) -> tuple[bytes, bytes]:
        """Return the head and the body of a request."""
        known = known or self._rng.choice(self._known)
        body = json.dumps(known.body).encode()
        head = (
            f"POST {known.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
            f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode(), body

    async def _trickle(self, start: bytes, rest: bytes, pause_s: float, limit_s: float) -> None:
        async with self._connected(start) as (reader, writer):
            refused = asyncio.create_task(self._is_refused(reader, limit_s))
            try:
                for i in range(len(rest)):
                    if refused.done():
                        break
                    writer.write(rest[i : i + 1])
                    await asyncio.sleep(pause_s)
                await refused
            finally:
                refused.cancel()

    async def _is_refused(self, reader: asyncio.StreamReader, limit_s: float) -> None:
        """Check that the server closes in time, by a 408 or without a word."""
        async with asyncio.timeout(limit_s + SLACK_S):
            data = await reader.read()
        self._counts["408" if data else "closed"] += 1
        if data and _parsed(data).status != http.client.REQUEST_TIMEOUT:
            raise WrongAnswerError(f"{data!r:.80}")

    @contextlib.asynccontextmanager
    async def _connected(
        self, data: bytes
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect from its own address, send some bytes, and close in the end."""
        reader, writer = await asyncio.open_connection(
            self._host, self._port, local_addr=(self._address, 0)
        )
        try:
            writer.write(data)
            yield reader, writer
        finally:
            writer.close()


class _Received:
    """Bytes that came, as `http.client` wants them: as a socket."""

    def __init__(self, data: bytes):
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parsed(data: bytes) -> http.client.HTTPResponse:
    """Return a whole answer; interim ones before it are passed over."""
    if not data:
        raise ConnectionResetError
    # Of a socket it calls `makefile` alone.
    response = http.client.HTTPResponse(_Received(data))  # type: ignore[arg-type]
    response.begin()
    return response
