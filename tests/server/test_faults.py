"""The server as a process: clients that disconnect, are slow, send invalid bytes or are many.

What protects it: a body is kept up to its limit, and else answered with 413; an answer is drawn as
fast as the model can and kept for whoever reads slowly, but not for who reads nothing for a minute.
The deadlines of heads and bodies, and the limit of connections, are in test_connections.py.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from tests.helpers import ROOT
from tests.helpers.server_process import ENDLESS, QUEUE, SLOTS, TOKEN, read_first, served
from tests.helpers.serving import (
    ANSWER,
    COMMENT,
    COMPLETIONS,
    MODEL,
    QUESTION,
    RUN,
    events_of,
    paused,
    serving,
    wait_until,
)

pytestmark = pytest.mark.slow

KNOWN = {"prompt": QUESTION, "temperature": 0}
LONG = json.dumps({**ENDLESS, "prompt": "x"}).encode()


@pytest.fixture(scope="module")
def process():
    with served() as process:
        yield process


@pytest.fixture
def server(process):
    """The server, which must be idle and whole after every test."""
    yield process
    process.wait_until_idle()
    assert_well(process)


def assert_well(server):
    status, body = server.post(RUN, KNOWN)
    assert (status, body["result"]["response"]) == (200, ANSWER)


def head(length, path=RUN):
    """Return the head of a request whose body is so long, or comes in chunks."""
    size = f"Content-Length: {length}" if isinstance(length, int) else "Transfer-Encoding: chunked"
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", size]
    return "\r\n".join([*lines, "", ""]).encode()


@contextlib.contextmanager
def connected(server, data=b""):
    """Connect and send some bytes; give the socket."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(data)
        yield client


def read_all(client):
    """Return what comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):  # it closed on what we still had to say
        while part := client.recv(1 << 16):
            data += part
    return data


# Clients that disconnect.


def test_a_killed_client_frees_its_slot(server):
    before = server.metrics()["generation_tokens_total"]
    with server.ask("POST", COMPLETIONS, LONG) as response:
        read_first(response)
        assert server.in_use() == 1
    server.wait_until_idle()
    assert server.metrics()["generation_tokens_total"] - before < 500
    assert server.metrics()['generations_total{end="cancelled"}'] >= 1


def test_a_thousand_disconnects_leave_the_server_whole(server):
    """After nothing, a part of the head, a part of the body, or all of it."""
    start = head(len(LONG), COMPLETIONS)
    request = start + LONG
    cuts = [len(request) * (i % 8) // 7 for i in range(1000)]
    with server.ending(sum(cut >= len(start) for cut in cuts), COMPLETIONS):
        for cut in cuts:
            with connected(server, request[:cut]):
                pass
    server.wait_until_idle()


def test_connection_reset_in_midstream_frees_its_slot(server):
    """A connection that ends without a farewell: RST instead of FIN."""
    for _ in range(SLOTS + 1):
        with connected(server, head(len(LONG), COMPLETIONS) + LONG) as client:
            assert client.recv(1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.wait_until_idle()


# Slow clients.


def test_an_idle_connection_is_kept(server):
    """Beyond the 5 s of uvicorn's own: who used it again just then would meet its end."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        sockets = set()
        for seconds in (0, 6):
            time.sleep(seconds)
            connection.request("GET", "/healthz")
            sockets.add(connection.sock)
            assert connection.getresponse().read() == b"ok\n"
        assert len(sockets) == 1


def test_slow_readers_do_not_delay_others(server):
    """As many as there are slots read a byte, and no more, of all that is there for them."""
    with contextlib.ExitStack() as stack:
        for _ in range(SLOTS):
            client = socket.socket()
            stack.callback(client.close)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(("127.0.0.1", server.port))
            body = json.dumps({**ENDLESS, "prompt": "x", "logprobs": 5}).encode()
            client.sendall(head(len(body), COMPLETIONS) + body)
            assert client.recv(1)
        for _ in range(3):
            assert_well(server)
        server.wait_until_idle()  # their slots are free though they have not read
        assert client.recv(1)


def test_slow_writers_do_not_delay_others(server):
    """Heads and bodies that never end, in four ways."""
    parts = [
        b"POST / HTTP/1.1\r\nHost",
        head(1000) + b'{"prompt"',
        head(None) + b'3\r\n{"p\r\n',
        b"",
    ]
    with contextlib.ExitStack() as stack:
        for i in range(100):
            stack.enter_context(connected(server, parts[i % 4]))
        assert_well(server)
        server.wait_until_idle()


def test_a_head_without_end_is_refused(server):
    with connected(server, b"GET / HTTP/1.1\r\n") as client:
        with contextlib.suppress(ConnectionError):
            for i in range(10_000):
                client.sendall(b"x-%d: %s\r\n" % (i, b"y" * 100))
        data = read_all(client)
    assert data == b"" or data.startswith(b"HTTP/1.1 431")


# Invalid input.


def test_a_chunked_body_without_end(server):
    """It is cut off at a few times the limit for bodies, not where memory ends."""
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    sent = 0
    with connected(server, head(None)) as client:
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                client.sendall(chunk)
                sent += 1
        data = read_all(client)
    assert sent < 64  # of which the sockets hold a few
    assert data == b"" or data.startswith(b"HTTP/1.1 413")


def test_a_body_too_large_is_not_asked_for(server):
    """A client that first asks whether to send it, as curl does, sends none of it."""
    request = head(9 << 20).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    with connected(server, request) as client:
        assert read_all(client).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 1000 + b"\r\n\r\n"]
)
def test_bytes_that_are_not_http_are_refused(server, data):
    with connected(server, data) as client:
        client.shutdown(socket.SHUT_WR)
        data = read_all(client)
    assert data == b"" or data.startswith(b"HTTP/1.1 400")


def test_pipelined_requests_are_answered_in_order(server):
    body = json.dumps(KNOWN).encode()
    bad = b'{"prompt": 5, "temperature": 9}'
    with connected(server, (head(len(body)) + body + head(len(bad)) + bad) * 3) as client:
        client.settimeout(5)
        data = b""
        while data.count(b"HTTP/1.1 ") < 6:
            data += client.recv(1 << 16)
    statuses = [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"400"] * 3


# More clients than slots.


def test_more_clients_than_the_queue_holds_get_an_answer_or_429(server):
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: server.post(RUN, KNOWN), range(128)))
    assert {status for status, _ in answers} <= {200, 429}
    right = [body["result"]["response"] for status, body in answers if status == 200]
    assert len(right) >= SLOTS + QUEUE
    assert set(right) == {ANSWER}


def test_a_fault_in_one_request_leaves_the_others_alone(monkeypatch, caplog):
    """A bug in one request is reported to its client; the other requests go on."""
    llm = Llama.load(DEMO_CHECKPOINT, slots=SLOTS)
    from llama_jax.server.openai import responses as openai_responses

    real = openai_responses.CompletionChoices.chunk

    def chunk(self, index, piece):
        if self._parsed.requests[0].parameters.seed == 13:
            raise RuntimeError("a secret")
        return real(self, index, piece)

    monkeypatch.setattr(openai_responses.CompletionChoices, "chunk", chunk)
    asking = {"model": MODEL, "prompt": "The capital of", "max_tokens": 30}
    with serving(llm) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def ask(seed):
            return client.post(COMPLETIONS, json={**asking, "seed": seed, "stream": seed % 2 == 0})

        alone = [ask(seed).status_code for seed in (12, 14)]
        answers = list(pool.map(ask, [13, 12, 13, 14, 13, 15, 13, 16]))
        assert alone == [200, 200]
        assert [answer.status_code for answer in answers] == [500, 200] * 4
        assert "secret" not in "".join(answer.text for answer in answers)
        wait_until(lambda: llm.engine.running == llm.engine.queued == 0)
    assert "a secret" in caplog.text


# Faults of the machine.


def test_a_device_out_of_memory_costs_the_requests_in_slots_and_no_other(monkeypatch, caplog):
    """They get 503 with Retry-After, or an event; those that wait are answered as if alone."""
    llm = Llama.load(DEMO_CHECKPOINT, slots=SLOTS)
    decode, known = llm.executor.decode, {**KNOWN, "seed": 5}
    out = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    def fail_once(*args):
        if llm.engine.queued < SLOTS:
            return decode(*args)
        monkeypatch.setattr(llm.executor, "decode", decode)
        raise out

    with serving(llm) as client, concurrent.futures.ThreadPoolExecutor(2 * SLOTS) as pool:

        def ask(number):
            return client.post(RUN, json={**known, "stream": number % 2 == 0})

        def said(answer):
            """Return the text; where a stream is cut into events depends on the load."""
            if COMMENT not in answer.text:
                return answer.json()["result"]["response"]
            *events, done = events_of(answer.text)
            assert done == "[DONE]"
            return "".join(event["response"] for event in events)

        right = said(ask(1))
        monkeypatch.setattr(llm.executor, "decode", fail_once)
        with paused(llm):
            answers = [pool.submit(ask, number) for number in range(2 * SLOTS)]
            wait_until(lambda: llm.engine.queued == 2 * SLOTS)
        answers = [answer.result() for answer in answers]
        failed = [answer for answer in answers if "out of memory" in answer.text]
        assert len(failed) == SLOTS
        for answer in failed:
            assert answer.status_code == 200 or answer.headers["retry-after"]
            assert answer.status_code in (200, 503)
            assert '"code":5001' in answer.text
        for answer in answers:
            assert answer in failed or said(answer) == right
        assert [said(ask(0)), said(ask(1))] == [right, right]
    assert caplog.text.count("RESOURCE_EXHAUSTED") == SLOTS
    assert "Traceback" not in caplog.text


def test_logits_that_are_not_finite_are_said_to_the_client():
    llm = Llama.load(DEMO_CHECKPOINT, slots=SLOTS)
    embed = llm.executor.params["embed"]
    llm.executor.params = llm.executor.params | {"embed": embed.at[300].set(np.nan)}
    with serving(llm) as client:
        body = {"model": MODEL, "prompt": [1, 300], "max_tokens": 2}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["code"] == "logits_not_finite"
        assert error["message"].startswith("the logits of output token 0 have a NaN or an infinity")
        assert client.post("/v1/completions", json=body | {"prompt": [1, 5]}).status_code == 200


@pytest.mark.parametrize("error", [RuntimeError("a secret"), MemoryError("a secret")], ids=type)
def test_a_fault_in_a_worker_thread_costs_its_request_alone(error, monkeypatch, caplog):
    llm = Llama.load(DEMO_CHECKPOINT, slots=SLOTS)
    submit = llm.engine.submit

    def flaky(request, *args, **kwargs):
        if request.parameters.seed == 13:
            raise error
        return submit(request, *args, **kwargs)

    monkeypatch.setattr(llm.engine, "submit", flaky)
    with serving(llm) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        seeds = [13, 12, 13, 14, 13, 15]
        answers = list(pool.map(lambda seed: client.post(RUN, json={**KNOWN, "seed": seed}), seeds))
        assert [answer.status_code for answer in answers] == [500, 200] * 3
        assert {a.json()["result"].get("response", ANSWER) for a in answers} == {ANSWER}
        assert "secret" not in "".join(answer.text for answer in answers)
        monkeypatch.undo()
        assert client.post(RUN, json={**KNOWN, "seed": 13}).json()["result"]["response"] == ANSWER
    assert "a secret" in caplog.text


def test_an_engine_that_ends_by_itself_leaves_no_request_waiting(monkeypatch):
    """A bug outside of what a turn catches: all requests get 503, those that wait too."""
    llm = Llama.load(DEMO_CHECKPOINT, slots=1)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    with (
        serving(llm, timeout_s=20) as client,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        with paused(llm):
            answers = [pool.submit(client.post, COMPLETIONS, json=body) for _ in range(4)]
            wait_until(lambda: llm.engine.queued == 4)

            def fail():
                raise RuntimeError("a bug")

            monkeypatch.setattr(llm.engine._clock, "start", fail)
        assert [answer.result().status_code for answer in answers] == [503] * 4
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
CACHED = """
import os, jax
from llama_jax import use_compile_cache
os.environ["XDG_CACHE_HOME"] = {home!r}
jax.config.update("jax_compilation_cache_dir", None)
use_compile_cache()
"""


@pytest.mark.parametrize("fault", ["full", "gone", "read-only", "corrupt"])
def test_a_cache_of_programs_that_fails_while_serving_costs_a_compilation(tmp_path, fault):
    """When the cause goes, what is compiled is kept again. A full disk is a limit on files here."""
    folder, kept = tmp_path / "llama_jax" / "compiled", tmp_path / "kept"
    before = CACHED.format(home=str(tmp_path))
    with served(before=before) as server:
        assert_well(server)
    before += LIMITED if fault == "full" else ""
    with served(before=before) as server:
        if fault == "corrupt":
            for entry in folder.glob("*-cache"):
                entry.write_bytes(b"not a program")
        else:
            folder.rename(kept)
        if fault == "full":
            folder.mkdir()
        elif fault == "read-only":
            folder.write_text("a file: a folder of mode 555 would not stop root")
        assert_well(server)
        if fault == "read-only":
            folder.unlink()
        if fault not in ("full", "corrupt"):
            folder.mkdir(exist_ok=True)
            before = set(folder.iterdir())
            scored = {"model": MODEL, "prompt": "x", "max_tokens": 1, "logprobs": 1, "echo": True}
            assert server.post(COMPLETIONS, scored)[0] == 200
            assert set(folder.iterdir()) > before
        assert_well(server)


def test_a_log_that_cannot_be_written_stops_no_request(tmp_path):
    """A limit on the size of a file fails as a full disk does; emptied, the file grows again."""
    log = tmp_path / "log"
    code = f"import sys; sys.argv = ['run.py', 'serve', '--port=0', '--slots=1']\n{LIMITED}\n"
    code += "from llama_jax.cli.main import entry\nentry()"
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=file, cwd=ROOT)
    try:
        wait_until(lambda: "serving" in log.read_text() or process.poll() is not None)
        [port] = re.findall(r"http://127\.0\.0\.1:(\d+) ", log.read_text())
        for emptied in (False, True):
            if emptied:
                os.truncate(log, 0)
            for _ in range(20):
                connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
                with contextlib.closing(connection):
                    connection.request("POST", RUN, json.dumps(KNOWN))
                    answer = json.loads(connection.getresponse().read())
                assert answer["result"]["response"] == ANSWER
            assert log.stat().st_size == 2000
        assert json.loads(log.read_text().splitlines()[0])["status"] == 200
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


# The end.


def test_sigterm_under_load_answers_running_requests_and_exits_0():
    """Streams and whole answers that are under way; the queue too; nothing new."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 100, "ignore_eos": True}
    results = []

    def ask(server, number):
        with contextlib.suppress(ConnectionError):  # it came after the end
            results.append(server.post(COMPLETIONS, {**body, "seed": number}))

    with served() as server:
        assert server.post(COMPLETIONS, body)[0] == 200
        with server.ask("POST", COMPLETIONS, LONG) as stream:
            read_first(stream)
            threads = [threading.Thread(target=ask, args=(server, i)) for i in range(12)]
            for thread in threads:
                thread.start()
            wait_until(lambda: server.in_use() > SLOTS)
            server.process.send_signal(signal.SIGTERM)
            rest = stream.read()
        for thread in threads:
            thread.join(60)
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.end() == 0
    assert len(results) > SLOTS
    for status, answer in results:
        assert status in (200, 503)
        if status == 200:
            assert answer["usage"]["completion_tokens"] == 100
    assert [status for status, _ in results].count(200) >= SLOTS
