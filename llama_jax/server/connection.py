"""Connection: one client's HTTP connection, with a bound on every state that it can be in.

uvicorn's own protocol has one deadline, for idle connections. It takes a half-closed connection for
a closed one, resets clients that still write, and answers what its parser refuses by a bare text.
"""

import asyncio
import collections
import enum
import math
import socket
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from llama_jax.server import errors
from llama_jax.server.errors import ApiError
from llama_jax.server.http_parser import HEAD_BYTES, HttpParser
from llama_jax.server.lingering import LingeringTransport

HEAD_S = 10.0
"""From a request's first byte to the end of its head, and from connecting to the first byte."""

FLUSH_S = 300.0
"""For a client to read the rest of an answer that is complete."""

LINGER_S = 30.0
"""For a client to end a body that is answered already; what comes is discarded."""

LINGER_SILENCE_S = 5.0
"""After which a client that is to end such a body is taken to wait for nothing."""

LINGER_BYTES = 16 * 2**20
"""Discarded at most of a body without end."""

LINGER_DECLARED_BYTES = 256 * 2**20
"""Discarded at most of a body whose length is known: many clients write all before they read."""

PROBE_S = 15.0
"""Between signs of life to a client that half-closed; the silence after which streams comment."""

FIRST_PROBE_S = 1.0
"""From a half-close to the first sign; many answers end before."""


class State(enum.Enum):
    """What a connection waits for."""

    IDLE = "a request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    BUSY = "the server's answer"
    FLUSHING = "the client to read the end of its answer"
    DISCARDING = "the rest of a body that is answered"
    LINGERING = "the client to close"


class Connection(H11Protocol):
    """One connection.

    Args:
        config: uvicorn's.
        server_state: uvicorn's; holds the set of open connections.
        app_state: the lifespan's.
        _loop: the event loop; None: the current one.
        closed: counts the connections that the server closed, by reason.
    """

    conn: HttpParser

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        closed: collections.Counter[str] | None = None,
    ):
        super().__init__(config, server_state, app_state, _loop)
        self.conn = HttpParser()
        self._closed = collections.Counter() if closed is None else closed
        self.since = self.loop.time()
        """When it began to wait for what it waits for (a body: when its head began)."""
        self._last_byte = self.since
        self._left = LINGER_BYTES
        self._probe_at = math.inf

    @property
    def state(self) -> State:
        """What it waits for."""
        if self.transport is None:
            return State.IDLE
        if self.transport.is_lingering:
            return State.LINGERING
        if self.cycle is not None and not self.cycle.response_complete:
            return State.BODY if self.cycle.more_body else State.BUSY
        if self.transport.get_write_buffer_size():
            return State.FLUSHING
        if self.conn.their_state is h11.SEND_BODY:
            return State.DISCARDING
        return State.HEAD if self.conn.line else State.IDLE

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        self.transport: Any = LingeringTransport(transport, self._is_client_writing)
        super().connection_made(self.transport)
        self.since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        self._last_byte = self.loop.time()
        if self.transport.is_lingering:
            self._left -= len(data)
            if self._left < 0:
                self.transport.abort()
            return
        if self.state is State.IDLE:
            self.since = self._last_byte
        super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio reads it; uvicorn has None
        """Go on with a request that is whole; a client may close the direction it needs no more."""
        if self.state is not State.BUSY:
            return False
        if self._probe_at == math.inf:
            self._probe_at = self.loop.time() + FIRST_PROBE_S
        return True

    # What uvicorn calls.

    def handle_events(self) -> None:
        """Handle what the parser found; answer what it refused."""
        super().handle_events()
        if self.conn.error is not None:
            error, self.conn.error = self.conn.error, None
            if error.error_status_hint == 431:
                self._refuse(ApiError(errors.HEAD_TOO_LARGE, HEAD_BYTES))
            else:
                self._refuse(ApiError(errors.NOT_HTTP, self.conn.reason(error)))

    def on_response_complete(self) -> None:
        """Turn to the next request, or close."""
        self.since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing() or self.state in (State.BODY, State.BUSY):
            return
        is_half_closed = self._probe_at < math.inf
        # A client that asked whether to send its body may leave it out now: the next bytes would
        # be either the body or a request.
        is_unclear = self.conn.their_state is h11.SEND_BODY and b"expect" in dict(self.headers)
        if is_half_closed or is_unclear or self.conn.their_state is h11.ERROR:
            self.transport.close()

    def shutdown(self) -> None:
        """End with what runs; nothing that still comes would be accepted."""
        state = self.state
        if state is State.BUSY:
            super().shutdown()
        elif state is State.BODY:
            self.cycle.keep_alive = False
            if not self.cycle.response_started:
                self._refuse(ApiError(errors.UNAVAILABLE, "shutting down"))
        elif self.transport is not None:
            self.conn.is_deaf = True
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a server may ignore an upgrade, and each request would write two lines."""

    # What the admission calls.

    def check(self, now: float) -> None:
        """Close it if it has waited too long; look for clients that are gone unnoticed."""
        age, state = now - self.since, self.state
        if self.transport is None:
            return
        if state is State.BUSY:
            self._check_client(now)
        elif state is State.IDLE and self.cycle is None and age > HEAD_S:
            # Not by a 408: a client that connected early would take it for its answer.
            self._close("no_request")
        elif state is State.HEAD and age > HEAD_S:
            self._closed["head_timeout"] += 1
            self._refuse(ApiError(errors.TIMEOUT))
        elif state is State.FLUSHING and age > FLUSH_S:
            self._close("unread")
        elif state in (State.DISCARDING, State.LINGERING):
            silence = now - max(self._last_byte, self.since)
            if age > LINGER_S or silence > LINGER_SILENCE_S:
                self._close("unfinished")

    def evict(self) -> None:
        """Close it at once for others to have its place."""
        self.connections.discard(self)
        self._close("evicted")

    def _close(self, reason: str) -> None:
        self._closed[reason] += 1
        self.transport.abort()

    def _check_client(self, now: float) -> None:
        """Notice a reset where nothing is read any more, and provoke it by a sign of life.

        The end of a stream of bytes can mean a half-close or a client that is gone. Only the answer
        to bytes sent tells.
        """
        is_half_closed = self._probe_at < math.inf
        if not (is_half_closed or self.flow.read_paused):
            return
        end: socket.socket = self.transport.get_extra_info("socket")
        if end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._close("gone")
        elif now >= self._probe_at:
            self._probe_at = now + PROBE_S
            self._probe()

    def _probe(self) -> None:
        comment = cast(dict[str, Any], self.cycle.scope).get("llama_jax.comment")
        if not self.cycle.response_started:
            if self.cycle.scope["http_version"] == "1.1":  # 1.0 has no interim responses
                event = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self.transport.write(self.conn.send(event))
        elif comment is not None and not self.flow.write_paused:
            self.transport.write(self.conn.send(h11.Data(data=comment)))

    def _is_client_writing(self) -> bool:
        """Return whether to linger, and set for how long."""
        if not self.conn.is_deaf and self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            return False
        self.since = self.loop.time()
        declared = dict(self.headers or ()).get(b"content-length", b"")
        if declared.isdigit() and int(declared) <= LINGER_DECLARED_BYTES:
            self._left = int(declared) + LINGER_BYTES
        return True

    def _refuse(self, error: ApiError) -> None:
        """Answer a request that is not whole by an error, through the application, and close."""
        error.headers["connection"] = "close"
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.more_body and not self.cycle.response_started:
                cast(dict[str, Any], self.cycle.scope)[errors.REFUSAL] = error
            else:
                self.transport.close()
                self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif self.conn.our_state is h11.IDLE:
            self._answer_unparsed(error)
        else:
            self.transport.close()

    def _answer_unparsed(self, error: ApiError) -> None:
        """Run the application for a request that the parser could not give."""
        self._unset_keepalive_if_required()
        method, path = self.conn.request_line()
        self.conn.is_deaf = True
        self.headers = []
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme or "http",
            # h11 never saw a HEAD, and would miss the body that its answer lacks.
            "method": "" if method == "HEAD" else method,
            "root_path": "",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "state": self.app_state.copy(),
            errors.REFUSAL: error,
        }
        self.cycle = RequestResponseCycle(
            scope=scope,
            conn=self.conn,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            on_response=self.on_response_complete,
        )
        self.cycle.more_body = False
        task = self.loop.create_task(self.cycle.run_asgi(cast(Any, self.app)))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
