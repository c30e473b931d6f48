"""The server in tests as a process of its own."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tests.helpers.serving import COMPLETIONS, MODEL, wait_until

TOKEN = "a-token-nobody-else-has"
SLOTS, QUEUE = 4, 16
ENDLESS = {"model": MODEL, "max_tokens": 500, "ignore_eos": True, "temperature": 5, "stream": True}
"""As long as the context allows, for the completions route; its prompt is to be added."""

_CODE = f"""
import json, sys
from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server.serve import serve

max_queue, arguments, before = map(json.loads, sys.argv[1:])
exec(before)
serve(lambda: Llama.load(DEMO_CHECKPOINT, slots={SLOTS}, max_queue=max_queue), **arguments)
"""


class ServerProcess:
    """A process that serves the demo model, and what it said on stderr so far.

    Args:
        max_queue: the engine's.
        before: code that the process runs first, such as a shorter deadline.
        **arguments: of `serve`.
    """

    def __init__(self, max_queue: int | None = QUEUE, before: str = "", **arguments: Any):
        arguments = {"port": 0, "api_token": TOKEN, "warm_up": False, **arguments}
        settings = (max_queue, arguments, before)
        command = [sys.executable, "-c", _CODE, *map(json.dumps, settings)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            wait_until(lambda: "serving" in self.log or self.process.poll() is not None, 120)
            [port] = re.findall(r"http://127\.0\.0\.1:(\d+) ", self.log)
        except BaseException:
            self.process.kill()
            self.end()
            raise
        self.port = int(port)
        self.url = f"http://127.0.0.1:{port}"

    @property
    def log(self) -> str:
        """What it said so far."""
        return "".join(self._lines)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The lines of the access log: one for each call that is over."""
        return [json.loads(line) for line in self._lines if line.startswith("{")]

    @contextlib.contextmanager
    def ending(self, calls: int, path: str) -> Iterator[None]:
        """Wait for so many more calls of a path to end, whether or not their clients stay.

        What a client sent before it disconnected may still lie in the server's socket. So an idle
        server may be one that has not begun.
        """

        def count() -> int:
            return sum(call["path"] == path for call in self.calls)

        before = count()
        yield
        wait_until(lambda: count() >= before + calls)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Return the status and the parsed answer."""
        with self.ask("POST", path, body, **headers) as response:
            return response.status, json.loads(response.read())

    @contextlib.contextmanager
    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request; give the response, of which nothing is read yet, and disconnect.

        A body of bytes is sent as it is, another as JSON.
        """
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(
                method, path, content, {"Authorization": f"Bearer {TOKEN}"} | headers
            )
            with connection.getresponse() as response:
                yield response

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Have as many requests run and wait as may, for about a second."""
        self.wait_until_idle()
        with self.ask("POST", COMPLETIONS, endless(SLOTS + QUEUE)) as response:
            assert response.status == 200
            yield
        self.wait_until_idle()

    def metrics(self) -> dict[str, float]:
        """Return what /metrics says, by name and labels."""
        with self.ask("GET", "/metrics") as response:
            text = response.read().decode()
        return {
            name: float(value)
            for name, value in re.findall(r"^llama_jax_(\S+) (\S+)$", text, re.MULTILINE)
        }

    def in_use(self) -> float:
        """Return how many requests run or wait."""
        metrics = self.metrics()
        return metrics["num_requests_running"] + metrics["num_requests_waiting"]

    def wait_until_idle(self) -> None:
        """Wait until nothing runs or waits."""
        wait_until(lambda: not self.in_use(), 30)

    def end(self) -> int:
        """Wait for its end; return its exit status."""
        status = self.process.wait(60)
        self._reader.join(60)
        assert self.process.stderr
        self.process.stderr.close()
        return status

    def _read(self) -> None:
        assert self.process.stderr
        self._lines += iter(self.process.stderr.readline, "")


def read_first(stream: http.client.HTTPResponse) -> bytes:
    """Read a stream up to its first event, that is up to its first token."""
    read = b""
    while not (line := stream.readline()).startswith(b"data: "):
        assert line, "the stream ended"
        read += line
    return read + line


def endless(answers: int) -> dict[str, Any]:
    """Return the body of a completion that asks for so many endless answers."""
    return {**ENDLESS, "prompt": ["x"] * answers}


@contextlib.contextmanager
def served(
    max_queue: int | None = QUEUE, before: str = "", **arguments: Any
) -> Iterator[ServerProcess]:
    """Start a server and see to it that it ends; it must not have logged a bug."""
    server = ServerProcess(max_queue, before, **arguments)
    try:
        yield server
        assert "Traceback" not in server.log
    finally:
        server.process.kill()  # if it is not over yet
        server.end()
