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

from serving import COMPLETIONS, MODEL, wait_until

TOKEN = "a-token-nobody-else-has"
SLOTS, QUEUE = 4, 16
ENDLESS = {"model": MODEL, "max_tokens": 500, "ignore_eos": True, "temperature": 5, "stream": True}
"""As long as the context allows, for the completions route; its prompt is to be added."""

_CODE = f"""
from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server.serve import serve

load = lambda: Llama.load(DEMO_CHECKPOINT, slots={SLOTS}, max_queue={QUEUE})
serve(load, port=0, api_token={TOKEN!r}, warm_up=False)
"""


class ServerProcess:
    """A process that serves the demo model, and what it said on stderr so far."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _CODE]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_until(lambda: "serving" in self.log or self.process.poll() is not None, 120)
        [port] = re.findall(r"http://127\.0\.0\.1:(\d+) ", self.log)
        self.port = int(port)
        self.url = f"http://127.0.0.1:{port}"

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Return the status and the parsed answer; a body of bytes is sent as it is."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.ask("POST", path, content, **headers) as response:
            return response.status, json.loads(response.read())

    @contextlib.contextmanager
    def ask(
        self, method: str, path: str, content: bytes | None = None, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request; give the response, of which nothing is read yet, and hang up."""
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
        body = json.dumps({**ENDLESS, "prompt": ["x"] * (SLOTS + QUEUE)}).encode()
        self.wait_until_idle()
        with self.ask("POST", COMPLETIONS, body) as response:
            assert response.status == 200
            yield

    def metrics(self) -> dict[str, float]:
        """Return what /metrics says, by name and labels."""
        with self.ask("GET", "/metrics") as response:
            text = response.read().decode()
        return {
            name: float(value)
            for name, value in re.findall(r"^llama_jax:(\S+) (\S+)$", text, re.MULTILINE)
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


@contextlib.contextmanager
def served() -> Iterator[ServerProcess]:
    """Start a server and see to it that it ends; it must not have logged a bug."""
    server = ServerProcess()
    try:
        yield server
        assert "Traceback" not in server.log
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.end()
