"""Admission: how many connections are open, and which of them make room for others."""

import asyncio
import collections
import heapq
import logging
import math
from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from llama_jax.server import errors
from llama_jax.server.auth import OPEN_PATHS
from llama_jax.server.connection import Connection, State
from llama_jax.server.errors import ApiError

_CHECK_S = 0.25
"""Between looks at all connections."""

_YOUNG_S = 1.0
"""An idle connection younger than this may be one whose request is on its way."""

_NOTE_S = 60.0
"""Between lines on stderr, so that no flood of clients becomes a flood of lines."""

_RESERVED = 8
"""One of so many connections is for health checks and refusals when all others are busy."""

_BATCH = 16
"""One of so many connections makes room at a time: finding the oldest costs a look at all."""

_ORDER = {
    State.IDLE: 0,
    State.DISCARDING: 0,
    State.LINGERING: 0,
    State.HEAD: 1,
    State.BODY: 1,
    State.FLUSHING: 2,
}
"""Which connections make room first; of equals, the one that has waited longest."""

_LOGGER = logging.getLogger("llama_jax.server")


class Admission:
    """An ASGI application that refuses requests when too many connections are busy.

    Args:
        app: the application for the others.
        limit: of open connections.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self.limit = app, limit
        self.closed: collections.Counter[str] = collections.Counter()
        """Connections that the server closed, by reason."""
        self.open: set[Connection] = set()
        self._noted_at = -math.inf

    def start(self, server_state: ServerState) -> None:
        """Begin to look after the connections of a server."""
        self.open = cast(set[Connection], server_state.connections)
        self._check()

    def make_room(self) -> bool:
        """Close connections beyond the limit; return False if too many are busy for that."""
        if len(self.open) > self.limit:
            self.evict(max(len(self.open) - self.limit, self.limit // _BATCH))
            self.note(f"{self.limit} connections are open, which is the limit")
        return len(self.open) <= self.limit

    def evict(self, count: int) -> None:
        """Close at most so many connections: those that wait longest for their client."""
        now = asyncio.get_running_loop().time()
        evictable = [connection for connection in self.open if _may_go(connection)]
        for connection in heapq.nsmallest(count, evictable, key=lambda each: _rank(each, now)):
            connection.evict()

    def note(self, what: str) -> None:
        """Say on stderr that the server is short of connections, once in a while."""
        now = asyncio.get_running_loop().time()
        if now - self._noted_at < _NOTE_S:
            return
        self._noted_at = now
        _LOGGER.warning(
            "%s; idle and unfinished ones are closed to make room (%d so far); raise it by "
            "ulimit -n, or put a proxy in front",
            what,
            self.closed["evicted"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and self._is_crowded():
            scope[errors.REFUSAL] = ApiError(
                *(errors.CONNECTIONS_FULL, "too many requests are open"),
                headers={"connection": "close"},
            )
        await self._app(scope, receive, send)

    def _is_crowded(self) -> bool:
        most = self.limit - max(1, self.limit // _RESERVED)
        if len(self.open) <= most:
            return False
        return sum(connection.state is State.BUSY for connection in self.open) > most

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.open):
            connection.check(now)
        loop.call_later(_CHECK_S, self._check)


def _may_go(connection: Connection) -> bool:
    return connection.transport is not None and connection.state is not State.BUSY


def _rank(connection: Connection, now: float) -> tuple[int, float]:
    """Return the order in which connections make room."""
    is_young = connection.state is State.IDLE and now - connection.since <= _YOUNG_S
    return _ORDER[connection.state] + is_young, connection.since
