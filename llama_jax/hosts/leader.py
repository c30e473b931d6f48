"""Leader: process 0, which has the requests, and tells the others which programs to run."""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from llama_jax.decode.lockstep import Lockstep
from llama_jax.decode.program import Program
from llama_jax.errors import printable
from llama_jax.hosts.ending import end_process
from llama_jax.hosts.held import kind_of
from llama_jax.hosts.link import Link
from llama_jax.hosts.messages import Call, Check, Compile, End, Failed, Held, Load

_END_S = 10
"""For another process to end after process 0 says so."""
_GRACE_S = 2
"""For this process to find the mistake that another one has reported."""


class Leader(Lockstep):
    """Send the other processes of a run what they do.

    They must make the same calls in the same order, since each is one computation of all devices.
    If one of them is lost, nothing can be computed any more: this process says which, and ends.

    Args:
        links: to all others.
    """

    def __init__(self, links: Sequence[Link]):
        self._links = links
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watching = [
            threading.Thread(target=self._watch, args=(link,), daemon=True) for link in links
        ]
        for thread in self._watching:
            thread.start()

    def load(self, **arguments: Any) -> None:
        """Let them load a model; see `Llama.load`."""
        self._send(Load(arguments))

    def check(self, fingerprint: str) -> None:
        """Let them compare their model's fingerprint with this process's."""
        self._send(Check(fingerprint))

    def compile(self, program: Program) -> None:
        """Let them compile a program, beside what they run."""
        self._send(Compile(program))

    def call(self, program: Program, values: Sequence[Any]) -> None:
        """Let them run a program; see `Executor`."""
        kinds = map(kind_of, values)
        sent = (v if kind is None else Held(kind) for v, kind in zip(values, kinds, strict=True))
        self._send(Call(program, tuple(sent)))

    def fail(self, error: Exception) -> None:
        """End, and so let them end: a call failed here that they may wait in."""
        time.sleep(2 * _GRACE_S)  # if one of them is lost, which made it fail, its watcher says so
        text = printable(f"{type(error).__name__}: {error}").partition("\n")[0]
        end_process(1, f"error: a computation of all processes failed ({text}); so all end")

    def end(self, status: int) -> None:
        """Let them end, as this process then does; wait until they have."""
        self._over.set()
        self._send(End(status))
        for thread in self._watching:
            thread.join(_END_S)

    def _send(self, message: Any) -> None:
        with self._lock:
            for link in self._links:
                with contextlib.suppress(OSError):  # it is lost: its watcher ends this process
                    link.send(message)

    def _watch(self, link: Link) -> None:
        """Wait for what a process says or does last."""
        reason, grace_s = "it has ended", 0.0
        with contextlib.suppress(EOFError, OSError):
            message = link.receive()
            if isinstance(message, Failed):
                reason, grace_s = message.reason, _GRACE_S
        if not self._over.wait(grace_s):
            end_process(1, f"error: process {link.peer} at {link.host}: {reason}; so all end")
