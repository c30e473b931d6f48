"""Acceptor: takes clients from the listening socket, never more than there are descriptors for.

asyncio's own accepts without a limit, and logs each failure for want of a descriptor.
"""

import asyncio
import socket
from collections.abc import Callable

from llama_jax.errors import InputError
from llama_jax.server.admission import Admission
from llama_jax.server.connection import Connection

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

MAX_CONNECTIONS = 4096
"""However many descriptors there are; each costs some tens of kilobytes."""

RESERVED_DESCRIPTORS = 64
"""For files, the listener, what JAX keeps open, and connections that are just being closed."""

_FEWEST_CONNECTIONS = 16
"""With fewer, health checks and a client or two would get into each other's way."""

_BURST = 16
"""Connections accepted at a time, before those that are open have their turn."""

_PAUSE_S = 0.1
"""Without accepting, when there is neither room nor a descriptor; clients wait in the backlog."""


def connection_limit() -> int:
    """Return how many connections the process has descriptors for; raise its own limit if it can.

    Raises:
        InputError: there are too few.
    """
    if resource is None:
        return MAX_CONNECTIONS
    wanted = MAX_CONNECTIONS + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_CONNECTIONS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    limit = allowed - RESERVED_DESCRIPTORS
    if limit < _FEWEST_CONNECTIONS:
        raise InputError(
            f"the process may open {allowed} files, expected at least "
            f"{RESERVED_DESCRIPTORS + _FEWEST_CONNECTIONS}; raise it by ulimit -n"
        )
    return limit


class Acceptor:
    """Accepts connections while there is room; what uvicorn expects of asyncio's server.

    Args:
        listener: a socket that listens.
        new_connection: makes a connection's protocol.
        admission: makes room.
    """

    def __init__(
        self,
        listener: socket.socket,
        new_connection: Callable[[], Connection],
        admission: Admission,
    ):
        self._listener, self._new_connection = listener, new_connection
        self._admission = admission
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accept no more."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Return: nothing is left to do."""

    def _accept(self) -> None:
        for _ in range(_BURST):
            try:
                client, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Mostly no descriptor is left. What is ready stays ready, so asking again at once
                # would take all the time there is.
                self._admission.evict(_BURST)
                self._admission.note(f"accepting connections failed ({error.strerror or error})")
                self._pause()
                return
            client.setblocking(False)
            connection = self._new_connection()
            self._admission.open.add(connection)
            task = self._loop.create_task(self._connect(connection, client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if not self._admission.make_room():
                self._pause()
                return

    async def _connect(self, connection: Connection, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, client)
        finally:
            if connection.transport is None:
                self._admission.open.discard(connection)
                client.close()

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._is_closed:
            return
        if self._admission.make_room():
            self._loop.add_reader(self._listener, self._accept)
        else:
            self._loop.call_later(_PAUSE_S, self._resume)
