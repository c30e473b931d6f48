"""LingeringTransport: a transport whose close lets the client read the answer first.

A socket that is closed while the client still writes is reset, and the reset can reach the client
before it has read the answer. So the own direction is closed first, and what comes is discarded.
"""

import asyncio
from collections.abc import Callable
from typing import Any


class LingeringTransport:
    """A socket's transport; all but closing is the transport's own.

    Args:
        transport: the socket's.
        is_client_writing: whether more of a request may come.
    """

    def __init__(self, transport: asyncio.Transport, is_client_writing: Callable[[], bool]):
        self._transport, self._is_client_writing = transport, is_client_writing
        self.is_lingering = False
        """Whether everything is said, and what the client sends is to be discarded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing more can be sent."""
        return self.is_lingering or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send, unless everything is said already."""
        if not self.is_lingering:
            self._transport.write(data)

    def close(self) -> None:
        """Close when what is written is sent; a second call does not linger."""
        if self.is_closing() or not self._is_client_writing():
            self._transport.close()
            return
        self.is_lingering = True
        try:
            self._transport.write_eof()
        except OSError:  # the client is gone
            self._transport.abort()
        else:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once; what is not sent yet is lost."""
        self._transport.abort()
