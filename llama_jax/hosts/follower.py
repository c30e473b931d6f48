"""Follower: a process that runs what process 0 tells it to, on its own part of the devices."""

import queue
import signal
import threading
from typing import Any, NoReturn

from llama_jax.decode.executor import Executor
from llama_jax.errors import InputError, printable
from llama_jax.hosts.ending import end_process
from llama_jax.hosts.held import kind_of
from llama_jax.hosts.link import Link
from llama_jax.hosts.messages import Call, Check, Compile, End, Failed, Held, Load
from llama_jax.llama import Llama


def follow(link: Link) -> NoReturn:
    """Do what process 0 says, and end as it ends.

    If process 0 is lost, or something fails here, the process ends at once.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a launcher sends them to all: process 0 decides
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive_all, args=(link, inbox), daemon=True).start()
    try:
        status = _Follower(inbox).run()
    except Exception as error:
        known = isinstance(error, InputError)
        reason = printable(str(error) if known else f"{type(error).__name__}: {error}")
        link.send(Failed(reason.partition("\n")[0]))
        status = 2 if known else 1
    # Not by the interpreter's exit, where JAX would wait for the others.
    end_process(status)


def _receive_all(link: Link, inbox: queue.SimpleQueue[Any]) -> None:
    """Receive in a thread of its own: the main one may wait in a call that process 0 left."""
    while True:
        try:
            message = link.receive()
        except (EOFError, OSError):
            end_process(1, f"error: process 0 at {link.host} is lost; so this process ends")
        inbox.put(message)
        if isinstance(message, End):
            return


class _Follower:
    """The model of this process, and what its programs have returned.

    Args:
        inbox: the messages.
    """

    def __init__(self, inbox: queue.SimpleQueue[Any]):
        self._inbox = inbox
        self._llm: Llama | None = None
        self._held: dict[str, Any] = {}
        self._to_compile: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def _executor(self) -> Executor:
        assert self._llm is not None
        return self._llm.executor

    def run(self) -> int:
        while True:
            match self._inbox.get():
                case Load(arguments):
                    self._llm = Llama.load(**arguments)
                    self._held = {"params": self._executor.params}
                    threading.Thread(target=self._compile_all, daemon=True).start()
                case Check(fingerprint):
                    self._check(fingerprint)
                case Compile(program):
                    self._to_compile.put(program)
                case Call(program, values):
                    self._call(program, values)
                case End(status):
                    return int(status)

    def _check(self, fingerprint: str) -> None:
        assert self._llm is not None
        if (own := self._llm.engine.fingerprint) != fingerprint:
            raise InputError(
                f"its model's fingerprint is {own}, expected process 0's, {fingerprint}; give all "
                "the same checkpoint, versions, kernels, processors and XLA flags"
            )

    def _call(self, program: Any, values: tuple[Any, ...]) -> None:
        taken = (self._held[v.kind] if isinstance(v, Held) else v for v in values)
        results = self._executor.call(program, *taken)
        for result in (results, *(results if type(results) is tuple else ())):
            if (kind := kind_of(result)) is not None:
                self._held[kind] = result

    def _compile_all(self) -> None:
        while True:
            self._executor.compile(self._to_compile.get())
