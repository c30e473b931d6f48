"""The server as a process: how it starts, and how it ends."""

import contextlib
import errno
import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from llama_jax import InputError
from llama_jax.engine.engine import MAX_FAILURES
from llama_jax.server import serve as server
from llama_jax.server.serve import serve
from tests.helpers import ROOT
from tests.helpers.server_process import TOKEN, endless, read_first, served
from tests.helpers.serving import COMPLETIONS, MODEL, QUESTION, RUN, events_of, wait_until


def test_sigterm_drains_requests_and_exits_0():
    with served() as server:
        _, answer = server.post(RUN, {"prompt": QUESTION, "seed": 1})
        assert answer["result"]["response"] == "The capital of France is Paris."
        assert re.search(
            rf"^serving {MODEL}: the embedded demo model, float32, 4 slots, context 512, "
            rf"\d+\.\d\d MB; open http://127\.0\.0\.1:{server.port} in a browser$",
            server.log,
            re.MULTILINE,
        )
        assert server.post(RUN, {"prompt": "x"}, Authorization="Bearer other")[0] == 401
        body = endless(8) | {"max_tokens": 100, "stream_options": {"include_usage": True}}
        with server.ask("POST", COMPLETIONS, body) as running:
            first = read_first(running)
            server.process.send_signal(signal.SIGTERM)
            events = events_of((first + running.read()).decode())
        assert events[-1] == "[DONE]"
        assert events[-2]["usage"]["completion_tokens"] == 8 * 100
        assert server.end() == 0
    assert server.calls[-1]["completion_tokens"] == 8 * 100
    assert "Traceback" not in server.log
    assert TOKEN not in server.log


@pytest.mark.slow
def test_requests_beyond_the_drain_time_end_by_an_error():
    with (
        served(max_queue=None, drain_s=0.1) as server,
        server.ask("POST", COMPLETIONS, endless(128)) as running,
    ):
        first = read_first(running)
        server.process.send_signal(signal.SIGINT)  # as good as SIGTERM
        events = events_of((first + running.read()).decode())
        assert events[-1]["errors"][0]["code"] == 5001
        assert "shutting down" in events[-1]["error"]["message"]
        assert server.end() == 0
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_sighup_lets_a_stream_end():
    # These tests may run under `nohup`, whose children ignore the signal.
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    with served(before=heard) as server, server.ask("POST", COMPLETIONS, endless(1)) as running:
        first = read_first(running)
        server.process.send_signal(signal.SIGHUP)
        assert events_of((first + running.read()).decode())[-1] == "[DONE]"
        assert server.end() == 0


@pytest.mark.slow
def test_signals_without_meaning_change_nothing():
    with served() as server, server.ask("POST", COMPLETIONS, endless(1)) as running:
        first = read_first(running)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
            server.process.send_signal(number)
        assert events_of((first + running.read()).decode())[-1] == "[DONE]"
        assert server.post(RUN, {"prompt": "x"})[0] == 200
        assert server.process.poll() is None


@pytest.mark.slow
def test_sighup_is_ignored_under_nohup():
    """A process that starts with SIGHUP ignored is to outlive its terminal."""
    with served(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)") as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.post(RUN, {"prompt": "x"})[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


@pytest.mark.slow
def test_second_signal_ends_the_drain():
    with (
        served(max_queue=None, drain_s=3600) as server,
        server.ask("POST", COMPLETIONS, endless(128)) as running,
    ):
        first = read_first(running)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [({}, 200), ({"api_token": None}, 403), ({"api_token": None, "insecure": True}, 200)],
)
def test_another_name_of_this_machine_needs_a_token(arguments, status):
    with served(**arguments) as server:
        assert server.post(RUN, {"prompt": "x"})[0] == 200
        assert server.post(RUN, {"prompt": "x"}, Host="example.com")[0] == status


def test_port_in_use_is_reported_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port} .*in use"):
            serve(never, port=port)
    with pytest.raises(InputError, match="port is 70000, expected 0"):
        serve(never, port=70000)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_a_client_that_reads_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "_UNREAD_S", 0.5)
    with (
        server._listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        connection.settimeout(60)
        with pytest.raises(TimeoutError) as cut_off:
            connection.sendall(bytes(1 << 26))
        assert cut_off.value.errno == errno.ETIMEDOUT


class LoadedError(Exception):
    pass


def never():
    raise LoadedError


@pytest.mark.slow
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


@contextlib.contextmanager
def serve_changed(changes):
    """Start a server of the demo model in a process of its own, after some lines of code."""
    code = (
        "import threading, time; from llama_jax import Llama\n"
        "from llama_jax.server import serve, service\n"
        "from llama_jax.demo import DEMO_CHECKPOINT\n"
        f"llm = Llama.load(DEMO_CHECKPOINT)\n{changes}\n"
        "serve.serve(lambda: llm, port=0, warm_up=False)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_stop_does_not_wait_for_a_compilation():
    """XLA cannot be interrupted, and may compile for minutes: here, for ever."""
    changes = "service.JOIN_S = 0.1\nllm.engine.run = lambda stopping: threading.Event().wait()"
    with serve_changed(changes) as process:
        assert "serving" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_device_that_fails_every_call_ends_the_process():
    changes = (
        "def fail(*_, **__):\n"
        "    raise RuntimeError('the device is gone')\n"
        "llm.executor.prefill_chunk = fail"
    )
    with serve_changed(changes) as process:
        port = int(re.search(r"127\.0\.0\.1:(\d+)", process.stderr.readline())[1])
        answered = 0
        while process.poll() is None and answered < MAX_FAILURES:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(client):
                client.request("POST", RUN, json.dumps({"prompt": "x"}))
                assert client.getresponse().status in (500, 503)
            answered += 1
        assert process.wait(60) == 1
        assert f"failed {MAX_FAILURES} times in a row" in process.stderr.read()
