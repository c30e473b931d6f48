"""Link: a TCP connection between process 0 and another, over which Python objects go.

Process 0 spreads its address and a secret over the devices, which belong to the run alone. A
message is a pickle: only who has sent the secret is read.
"""

import hmac
import pickle
import secrets
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_SECRET_BYTES, _INDEX_BYTES, _SPREAD_BYTES = 32, 4, 512
_GREETING_S = 10
"""For who has connected to say the secret."""
_SILENCE_S, _PROBES_S, _PROBES = 10, 5, 4
"""A host that is gone without a word is noticed after some 30 s."""
_ELSEWHERE = ("192.0.2.1", 9)
"""An address of no host (RFC 5737): the way to it tells the own address that others reach."""


class Link:
    """One end of a connection. Each direction may be used by one thread at a time.

    Args:
        connected: the socket.
        peer: the number of the process at the other end.
    """

    def __init__(self, connected: socket.socket, peer: int):
        self.peer = peer
        self.host = str(connected.getpeername()[0]).removeprefix("::ffff:")
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", _SILENCE_S),
            ("TCP_KEEPINTVL", _PROBES_S),
            ("TCP_KEEPCNT", _PROBES),
            ("TCP_USER_TIMEOUT", 1000 * (_SILENCE_S + _PROBES_S * _PROBES)),
        ):
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._connected = connected
        self._reader, self._writer = connected.makefile("rb"), connected.makefile("wb")

    def close(self) -> None:
        """Close it: the other end then reads its end."""
        for part in (self._reader, self._writer, self._connected):
            part.close()

    def send(self, message: Any) -> None:
        """Send an object.

        Raises:
            OSError: the other end is gone.
        """
        pickle.dump(message, self._writer, pickle.HIGHEST_PROTOCOL)
        self._writer.flush()

    def receive(self) -> Any:
        """Wait for the next object.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        return pickle.load(self._reader)


def connect_all(host: str | None, timeout_s: float) -> list[Link]:
    """Connect process 0 with each other one; every process calls it at the same time.

    Args:
        host: where the others reach process 0; None: where its way to other networks begins.
        timeout_s: for all to connect.

    Returns:
        On process 0 its links, by process; on another the one to process 0.

    Raises:
        OSError: one did not come.
    """
    if jax.process_index() == 0:
        return _accept_all(host, timeout_s)
    port, secret, host = pickle.loads(_spread(b""))
    connected = socket.create_connection((host, port), timeout_s)
    connected.sendall(secret + jax.process_index().to_bytes(_INDEX_BYTES))
    return [Link(connected, 0)]


def _accept_all(host: str | None, timeout_s: float) -> list[Link]:
    secret, links = secrets.token_bytes(_SECRET_BYTES), {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as listener:
        _spread(pickle.dumps((listener.getsockname()[1], secret, host or _own_address())))
        listener.settimeout(timeout_s)
        while len(links) < jax.process_count() - 1:
            connected, _ = listener.accept()
            connected.settimeout(_GREETING_S)
            try:
                said = connected.recv(_SECRET_BYTES + _INDEX_BYTES, socket.MSG_WAITALL)
            except OSError:
                said = b""
            if not hmac.compare_digest(said[:_SECRET_BYTES], secret):  # a stranger
                connected.close()
                continue
            peer = int.from_bytes(said[_SECRET_BYTES:])
            links[peer] = Link(connected, peer)
    return [links[peer] for peer in sorted(links)]


def _spread(data: bytes) -> bytes:
    """Return on every process what process 0 gives; the others give none."""
    padded = np.frombuffer(data.ljust(_SPREAD_BYTES, b"\0"), np.uint8)[None]
    mesh = Mesh(np.array(jax.devices()), ("all",))
    parts = jax.make_array_from_callback(
        (mesh.size, _SPREAD_BYTES), NamedSharding(mesh, P("all")), lambda _: padded
    )
    whole = jax.jit(lambda rows: jnp.max(rows, axis=0), out_shardings=NamedSharding(mesh, P()))
    return bytes(np.asarray(whole(parts)))


def _own_address() -> str:
    """Return the address from which this host reaches others; a loopback one if it has no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)  # nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
