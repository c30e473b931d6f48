"""Serve: run the server until a signal stops it."""

import asyncio
import atexit
import contextlib
import dataclasses
import gc
import ipaddress
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tqdm
import uvicorn

from llama_jax.decode.memory import in_units, needed_memory
from llama_jax.demo import is_demo
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.nn.sharding import replicas_of, shards_of
from llama_jax.progress import say
from llama_jax.server import access_log, signals
from llama_jax.server.acceptor import Acceptor, connection_limit
from llama_jax.server.admission import Admission
from llama_jax.server.app import app_of
from llama_jax.server.connection import Connection
from llama_jax.server.service import Service
from llama_jax.server.settings import Settings

_BACKLOG = 2048
_LAST_PORT = 65535
_FLUSH_S = 5
"""For answers that were broken off to reach their clients."""

_KEEP_ALIVE_S = 75
"""For idle connections; longer than clients keep theirs, or a request meets the end of its own."""

_UNREAD_S = 60
"""After which a client that reads nothing of what it was sent is cut off (Linux)."""

_WATCH_S = 0.05


def serve(
    load: Callable[[], Llama],
    *,
    host: str = "127.0.0.1",
    port: int = 8787,
    insecure: bool = False,
    log_format: str = "auto",
    **settings: Any,
) -> None:
    """Serve a model until SIGTERM, SIGINT or SIGHUP, then let running requests end, and return.

    A line on stderr says when it is ready; the access log goes there too.

    Args:
        load: loads the model; called once the port is taken, so that a mistake shows at once.
        host: address to listen on; beyond this machine only with a token.
        port: 0: any free one.
        insecure: without a token, listen beyond this machine and answer to any name of it.
        log_format: of the access log: "json", "text", or "auto": text in a terminal.
        **settings: those of `Settings`.

    Raises:
        InputError: the port is taken, the server would be open to the network, or the process may
            open too few files.
    """
    chosen = Settings(**settings)
    if chosen.api_token is None and not insecure:
        if not _is_loopback(host):
            raise InputError(
                f"host is {host}, which other machines reach, and there is no token; set an API "
                "token, listen on 127.0.0.1, or allow it with insecure"
            )
        chosen = dataclasses.replace(chosen, local_only=True)
    limit = connection_limit()
    with signals.ignored(), _listen(host, port) as listener, _access_log_on_stderr(log_format):
        service = Service(load(), chosen, _Progress())
        try:
            asyncio.run(_Server(service, listener, limit).run_until_told())
        finally:
            service.stop()
    if service.failed:
        raise RuntimeError("the engine stopped; the log above says why")
    if not service.join():
        # It compiles. The interpreter's own exit would free what XLA's threads use.
        atexit.register(os._exit, 0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens already; clients that are early wait."""
    if not 0 <= port <= _LAST_PORT:
        raise InputError(f"port is {port}, expected 0 (any that is free) to {_LAST_PORT}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {host} port {port} ({reason}); name another host or port"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # what it accepts inherits it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_UNREAD_S * 1000))
    return listener


class _Progress:
    """The warm-up on stderr: a bar in a terminal, else one line."""

    def __init__(self) -> None:
        self._bar: tqdm.tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show how many programs of how many are compiled."""
        if self._bar is None:
            terminal = sys.stderr.isatty()
            if not terminal:
                say(f"warming up: {total} programs")
            self._bar = tqdm.tqdm(
                total=total,
                desc="warming up",
                unit=" programs",
                leave=False,
                disable=not terminal,
            )
        self._bar.update()
        if done == total:
            self._bar.close()


class _Server(uvicorn.Server):
    """Uvicorn, which drains the service on a signal, and then returns.

    Args:
        service: what it serves.
        listener: a socket that listens.
        limit: of open connections.
    """

    def __init__(self, service: Service, listener: socket.socket, limit: int):
        settings = service.settings
        app = app_of(service)
        self._admission = Admission(app, limit)
        app.state.metrics.watch(self._admission)
        config = uvicorn.Config(
            self._admission,
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.drain_s) + _FLUSH_S,
        )
        super().__init__(config)
        self._service, self._listener = service, listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without uvicorn's listeners, then accept."""
        await super().startup(sockets=[])
        self._admission.start(self.server_state)

        def new_connection() -> Connection:
            state, closed = self.server_state, self._admission.closed
            return Connection(self.config, state, self.lifespan.state, closed=closed)

        self.servers: list[Any] = [Acceptor(self._listener, new_connection, self._admission)]

    async def run_until_told(self) -> None:
        """Serve; return after a signal, or if the engine ended by itself."""
        watching = asyncio.create_task(self._watch())
        try:
            await self.serve([self._listener])
        finally:
            watching.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections; let what runs end, and break off what takes too long."""
        loop, service = asyncio.get_running_loop(), self._service
        service.drain()
        timer = loop.call_later(service.settings.drain_s, service.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals meanwhile; uvicorn's own would raise them once more at the end."""
        with signals.draining(self._handle_signal):
            yield

    def _handle_signal(self) -> None:
        """Stop; on a second signal, at once."""
        self._service.drain()
        if self.should_exit:
            self._service.cancel_all()
        self.should_exit = True

    async def _watch(self) -> None:
        """Tell when the model is ready; stop if it never will be, or is not any more."""
        while not (self.started and self._service.ready) and not self._service.failed:
            await asyncio.sleep(_WATCH_S)
        if self._service.ready:
            # What JAX and the model hold lives as long as the process. Looking through it at each
            # full collection would halt all requests for some 0.2 s.
            gc.collect()
            gc.freeze()
            say(_ready_line(self._service, self._listener))
        while not self._service.failed:
            await asyncio.sleep(_WATCH_S)
        self.should_exit = True


def _ready_line(service: Service, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    llm, executor = service.llm, service.llm.executor
    environment, mesh = llm.engine.environment, executor.mesh
    is_embedded = is_demo(environment.parts.get("weights"))
    name = "the embedded demo model" if is_embedded else environment.checkpoint
    slots, shards = executor.batch // replicas_of(mesh), shards_of(mesh)
    memory = needed_memory(llm.config, executor.plan, slots, llm.context, shards)
    each = f" on each of {mesh.size} devices" if mesh.size > 1 else ""
    return (
        f"serving {service.settings.models[0]}: {name or 'unnamed weights'}, "
        f"{llm.config.precision(llm.dtype)}, {executor.batch} slots, context {llm.context:,}, "
        f"{in_units(memory.total)}{each}; open http://{host}:{port} in a browser"
    )


@contextlib.contextmanager
def _access_log_on_stderr(log_format: str) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "text" or (log_format == "auto" and sys.stderr.isatty()):
        handler.setFormatter(access_log.ShortFormatter())
        handler.addFilter(access_log.is_no_probe)
    level, propagate = access_log.LOGGER.level, access_log.LOGGER.propagate
    access_log.LOGGER.addHandler(handler)
    access_log.LOGGER.setLevel(logging.INFO)
    access_log.LOGGER.propagate = False
    try:
        yield
    finally:
        access_log.LOGGER.removeHandler(handler)
        access_log.LOGGER.setLevel(level)
        access_log.LOGGER.propagate = propagate
