"""A server in a process of its own, for as long as it is measured."""

import asyncio
import contextlib
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import BinaryIO

from benchmarks.load.answer import Answer, read_answer
from benchmarks.load.client import HOST, ask, encode
from benchmarks.load.programs import PROGRAMS, Launch
from benchmarks.load.prompts import Prompt
from benchmarks.worker import ROOT, EngineError, jax_settings

READY_S = 600
"""Seconds that a server may take to load and compile."""
CLOSE_S = 20
"""Seconds that it may take to end."""


class Server:
    """A server that runs.

    Args:
        launch: which.
        process: its own.
        port: where it listens.
    """

    def __init__(self, launch: Launch, process: subprocess.Popen, port: int):
        self.launch, self.port, self._process = launch, port, process

    def encode(self, prompt: Prompt) -> bytes:
        """Return the request for a prompt."""
        return encode("/v1/completions", PROGRAMS[self.launch.program].request(self.launch, prompt))

    def ask(self, prompt: Prompt, timeout_s: float) -> Answer:
        """Send one request, and wait for its answer."""
        return read_answer(asyncio.run(ask(self.port, self.encode(prompt), timeout_s=timeout_s)))

    def cpu_s(self) -> float | None:
        """Return the seconds of processor time it has used; None: the system does not tell."""
        try:
            stat = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def check(self) -> None:
        """Raise EngineError if it has ended."""
        status = self._process.poll()
        if status is not None:
            killed = " (killed: perhaps out of memory)" if status == -9 else ""
            raise EngineError(f"{self.launch}: the server ended with status {status}{killed}")


@contextlib.contextmanager
def running(launch: Launch, log: BinaryIO) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it.

    Args:
        launch: which.
        log: open for writing; takes all that it prints.

    Raises:
        EngineError: it did not start.
    """
    port = _free_port()
    process = subprocess.Popen(
        PROGRAMS[launch.program].command(launch, port),
        cwd=ROOT,
        env=os.environ | jax_settings() | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C is for the orchestrator, which then ends its servers
    )
    try:
        server = Server(launch, process, port)
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    """Ask for a token until one comes."""
    until = time.monotonic() + READY_S
    while True:
        server.check()
        answer = server.ask(Prompt([5, 7, 11], 1), timeout_s=READY_S)
        if answer.error is None:
            return
        if time.monotonic() > until:
            raise EngineError(f"{server.launch}: no token after {READY_S} s; {answer.error}")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]
