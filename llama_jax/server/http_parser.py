"""HttpParser: h11's parser, which keeps what it refuses instead of raising it.

uvicorn answers a refusal by a plain text that nobody logs. `Connection` answers it in the server's
own form instead, so it needs the error, and the request line as far as it came.
"""

import re
import urllib.parse

import h11

HEAD_BYTES = 64 * 2**10
"""The most of a request line and its headers; beyond it the answer is 431."""

_LINE_BYTES = 4096
"""What is kept of a request line, for the log and the form of the answer."""

_TLS_HANDSHAKE = b"\x16\x03"
_REQUEST_LINE = re.compile(rb"([!-~]{1,20}) ([!-~]+)")


class HttpParser(h11.Connection):
    """The server's side of one connection."""

    def __init__(self):
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.line = b""
        """The beginning of a request whose head is not whole; empty: none has begun."""
        self.error: h11.RemoteProtocolError | None = None
        """Why the input was refused."""
        self.is_deaf = False
        """Whether all further input is ignored."""

    def receive_data(self, data: bytes) -> None:
        """Take what the client sent; what comes after its last request is dropped."""
        if self.is_deaf or self.their_state in (h11.MUST_CLOSE, h11.CLOSED):
            return
        if self.their_state is h11.IDLE and len(self.line) < _LINE_BYTES:
            self.line += data[: _LINE_BYTES - len(self.line)]
        super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event; after a refusal there is none."""
        if self.is_deaf:
            return h11.NEED_DATA
        if self.their_state is h11.MUST_CLOSE:
            return (
                h11.NEED_DATA
            )  # h11 would refuse bytes after the last request: too late to matter
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.error, self.is_deaf = error, True
            return h11.NEED_DATA
        if isinstance(event, h11.Request):
            self.line = b""
        return event

    def start_next_cycle(self) -> None:
        """Turn to the next request, of which some may be here already."""
        super().start_next_cycle()
        self.line = self.trailing_data[0][:_LINE_BYTES]

    def request_line(self) -> tuple[str, str]:
        """Return method and path as far as the line shows them, else empty strings."""
        match = _REQUEST_LINE.match(self.line)
        if match is None:
            return "", ""
        method, target = (part.decode("ascii") for part in match.groups())
        return method, urllib.parse.unquote(target.partition("?")[0])

    def reason(self, error: h11.RemoteProtocolError) -> str:
        """Return why input was refused, without the line that h11 quotes: it may hold a secret."""
        if self.line.startswith(_TLS_HANDSHAKE):
            return "use http://, not https://"
        return str(error).partition(": bytearray")[0]
