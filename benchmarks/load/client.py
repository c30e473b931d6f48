"""One request over HTTP, recorded as it comes: bytes and times, nothing is parsed meanwhile."""

import asyncio
import dataclasses
import json
import time
from typing import Any

HOST = "127.0.0.1"
BURST_S = 0.001
"""What arrives within this of what came before is of one burst: a server may write a burst in
several pieces. It is a fraction of what most models take for their next tokens."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """What came back for one request; times are of `time.perf_counter`."""

    began: float
    """When the request was due: one that is sent late has waited already."""
    arrivals: list[tuple[float, bytes]]
    problem: str | None = None
    """Why it is not whole, as far as the connection tells."""


class Connection(asyncio.Protocol):
    """Send one request, and keep what arrives until the server closes the connection."""

    def __init__(self, request: bytes):
        self._request = request
        self._transport: asyncio.Transport | None = None
        self.arrivals: list[tuple[float, bytes]] = []
        self.bursts = 0
        """That arrived so far."""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Keep it for later."""
        now = time.perf_counter()
        if not self.arrivals or now - self.arrivals[-1][0] > BURST_S:
            self.bursts += 1
        self.arrivals.append((now, data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        if not self.closed.done():
            self.closed.set_result(None) if exc is None else self.closed.set_exception(exc)

    def abort(self) -> None:
        """Hang up, if the server has not."""
        if self._transport is not None:
            self._transport.abort()


async def connect(port: int, request: bytes) -> Connection:
    """Send a request to a port of this machine.

    Raises:
        OSError: nobody answers there.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(request), HOST, port)
    return connection


def encode(path: str, body: dict[str, Any]) -> bytes:
    """Return a request as it goes over the wire; the connection ends with its answer."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


async def ask(
    port: int, request: bytes, *, timeout_s: float, due: float | None = None
) -> Recording:
    """Send a request and record its answer; what goes wrong is in the record.

    Args:
        port: of this machine.
        request: of `encode`.
        timeout_s: seconds to wait for all of the answer.
        due: when it was to be sent; None: now.
    """
    began = time.perf_counter() if due is None else due
    connection = problem = None
    try:
        async with asyncio.timeout(timeout_s):
            connection = await connect(port, request)
            await connection.closed
    except TimeoutError:
        problem = f"no whole answer within {timeout_s:g} s"
    except OSError as error:
        problem = f"{type(error).__name__}: {error.strerror or error}"
    finally:
        if connection is not None:
            connection.abort()
    return Recording(began, connection.arrivals if connection else [], problem)
