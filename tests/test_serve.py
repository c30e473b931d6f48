"""The server as a process: how it starts, and how it ends."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from serving import COMPLETIONS, MODEL, QUESTION, RUN, events_of, wait_until

from llama_jax import InputError
from llama_jax.server.serve import serve

CODE = """
import json, sys
from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server.serve import serve

serve(lambda: Llama.load(DEMO_CHECKPOINT, slots=4), warm_up=False, **json.loads(sys.argv[1]))
"""
TOKEN = "a-token-nobody-else-has"


class Server:
    """A process that serves the demo model, and what it said so far."""

    def __init__(self, **arguments):
        arguments = {"port": 0, "api_token": TOKEN, **arguments}
        command = [sys.executable, "-c", CODE, json.dumps(arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self._connections = contextlib.ExitStack()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        self.lines += iter(self.process.stderr.readline, "")

    @property
    def log(self):
        return "".join(self.lines)

    @property
    def port(self):
        wait_until(lambda: "serving" in self.log or self.process.poll() is not None, 120)
        [port] = re.findall(r"http://127\.0\.0\.1:(\d+) ", self.log)
        return int(port)

    def request(self, method, path, body=None, token=TOKEN):
        """Begin a request; return its response, which is yet to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self._connections.callback(connection.close)
        headers = {"Authorization": f"Bearer {token}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return self._connections.enter_context(connection.getresponse())

    def end(self):
        """Wait for its end; return its exit status."""
        status = self.process.wait(60)
        self._reader.join(60)
        self._connections.close()
        self.process.stdout.close()
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def started(**arguments):
    server = Server(**arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.end()


def long_request(choices):
    return {
        "model": MODEL,
        "prompt": ["x"] * choices,
        "stream": True,
        "max_tokens": 500,
        "ignore_eos": True,
        "temperature": 5,
    }


def test_it_lets_what_runs_end_and_exits_0():
    with started() as server:
        answer = json.load(server.request("POST", RUN, {"prompt": QUESTION, "seed": 1}))
        assert answer["result"]["response"] == "The capital of France is Paris."
        assert re.search(
            rf"^serving {MODEL} at http://127\.0\.0\.1:{server.port} \(4 slots, context 512\)$",
            server.log,
            re.MULTILINE,
        )
        assert server.request("GET", "/v1/models", token="other").status == 401
        hang_up_often(server)
        running = server.request("POST", COMPLETIONS, long_request(8))
        first = running.readline()
        server.process.send_signal(signal.SIGTERM)
        events = events_of((first + running.read()).decode())
        assert events[-1] == "[DONE]"
        assert events[-2]["usage"]["completion_tokens"] == 8 * 500
        assert server.end() == 0
    access = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert access[-1]["completion_tokens"] == 8 * 500
    assert "Traceback" not in server.log
    assert TOKEN not in server.log


def hang_up_often(server):
    """Connect, ask and go away at once, many times: no slot is left in use."""
    body = json.dumps({"prompt": "x", "max_tokens": 400, "stream": True})
    request = (
        f"POST {RUN} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    for i in range(200):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request[: -(i % 3) or None])

    def idle():
        text = server.request("GET", "/metrics").read().decode()
        values = re.findall(
            r"^llama_jax:num_requests_(?:running|waiting) (.*)$", text, re.MULTILINE
        )
        return values == ["0.0", "0.0"]

    wait_until(idle)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_takes_too_long_is_broken_off(number):
    with started(drain_s=0.1) as server:
        running = server.request("POST", COMPLETIONS, long_request(128))
        first = running.readline()
        server.process.send_signal(number)
        events = events_of((first + running.read()).decode())
        assert events[-1]["errors"][0]["code"] == 5001
        assert "shutting down" in events[-1]["error"]["message"]
        assert server.end() == 0
    assert "Traceback" not in server.log


def test_told_twice_it_waits_no_longer():
    with started(drain_s=3600) as server:
        running = server.request("POST", COMPLETIONS, long_request(128))
        first = running.readline()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not connects(server.port))
        server.process.send_signal(signal.SIGTERM)
        assert events_of((first + running.read()).decode())[-1]["errors"][0]["code"] == 5001
        assert server.end() == 0


def connects(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_open_to_the_network_needs_a_token():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(InputError, match=f"host is {host}, .* there is no token"):
            serve(never, host=host, port=0)
    with pytest.raises(InputError, match="api_token is empty"):
        serve(never, host="0.0.0.0", port=0, api_token="")
    for arguments in ({"insecure": True}, {"api_token": "x"}):
        with pytest.raises(LoadedError):
            serve(never, host="0.0.0.0", port=0, **arguments)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port} .*in use"):
            serve(never, port=port)
    with pytest.raises(InputError, match="port is 70000, expected 0"):
        serve(never, port=70000)


class LoadedError(Exception):
    pass


def never():
    raise LoadedError


def test_an_engine_that_fails_ends_the_process():
    code = (
        "from llama_jax import Llama; from llama_jax.server.serve import serve\n"
        "from llama_jax.demo import DEMO_CHECKPOINT\n"
        "def broken():\n"
        "    raise RuntimeError('no such device')\n"
        "    yield\n"
        "llm = Llama.load(DEMO_CHECKPOINT)\n"
        "llm.engine.warm_up = broken\n"
        "serve(lambda: llm, port=0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no such device" in done.stderr
    assert "the engine stopped" in done.stderr
