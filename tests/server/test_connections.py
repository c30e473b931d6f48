"""Connections in every state: each wait for a client has a bound, and each end is an answer."""

import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import time

import pytest

from llama_jax import InputError
from llama_jax.server import acceptor
from llama_jax.server.acceptor import MAX_CONNECTIONS, RESERVED_DESCRIPTORS, connection_limit
from llama_jax.server.admission import Admission
from llama_jax.server.body_budget import LARGEST_BODIES
from llama_jax.server.connection import State
from tests.helpers.server_process import TOKEN, endless, read_first, served
from tests.helpers.serving import ANSWER, COMPLETIONS, QUESTION, RUN, events_of, wait_until

KNOWN = json.dumps({"prompt": QUESTION, "temperature": 0}).encode()
SHORT_WAITS = """
from llama_jax.server import body, connection, middleware
connection.HEAD_S = body.SILENCE_S = 0.5
middleware.BODY_S = 2
"""
FORMS = pytest.mark.parametrize(
    ("path", "is_openai"), [(RUN, False), (COMPLETIONS, True)], ids=["native", "openai"]
)


@pytest.fixture(scope="module")
def server():
    with served(before=SHORT_WAITS) as server:
        yield server


def head(length, path=RUN, *extra):
    """Return the head of a request whose body is so long, or comes in chunks."""
    size = f"Content-Length: {length}" if isinstance(length, int) else "Transfer-Encoding: chunked"
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", size, *extra]
    return "\r\n".join([*lines, "", ""]).encode()


def request(body, path=RUN, *extra):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(body), path, *extra) + body


@contextlib.contextmanager
def connected(server, data=b""):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(data)
        yield client


class Answer:
    """The next whole response of a connection; an interim one is passed over."""

    def __init__(self, client):
        with http.client.HTTPResponse(client) as response:
            response.begin()
            self.status, self.headers = response.status, response.headers
            self.text = response.read().decode()

    @property
    def json(self):
        return json.loads(self.text)


def read_all(client):
    data = b""
    while part := client.recv(1 << 16):
        data += part
    return data


def check_refusal(server, answer, status, code, is_openai, path=None):
    """Check that an answer has the server's form, and one line in the access log."""
    identity = answer.headers["x-request-id"]
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert answer.json["errors"][0]["code"] == code
    assert (answer.json["error"]["code"] == str(code)) is not is_openai
    wait_until(lambda: any(call["request_id"] == identity for call in server.calls))
    [line] = [call for call in server.calls if call["request_id"] == identity]
    assert (line["status"], line["error_code"]) == (status, code)
    assert path is None or line["path"] == path


# Deadlines.


@FORMS
def test_stalled_head_gets_408(server, path, is_openai):
    with connected(server, head(9, path)[:-2]) as client:
        check_refusal(server, Answer(client), 408, 3007, is_openai, path)
        assert client.recv(1) == b""


@FORMS
@pytest.mark.parametrize(
    "start", [head(9, "PATH") + b"{", head(None, "PATH"), head(None, "PATH") + b"1;x"]
)
def test_stalled_body_gets_408(server, path, is_openai, start):
    with connected(server, start.replace(b"PATH", path.encode())) as client:
        check_refusal(server, Answer(client), 408, 3007, is_openai, path)
        assert read_all(client) == b""


def test_trickled_body_gets_408(server):
    """Each byte comes in time, the whole body does not."""
    with connected(server, head(1000)) as client:
        client.settimeout(0.1)
        for _ in range(100):
            client.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                assert client.recv(1, socket.MSG_PEEK)
                break
        client.settimeout(30)
        check_refusal(server, Answer(client), 408, 3007, False, RUN)


def test_trickled_head_gets_408(server):
    with connected(server, b"GET /healthz HTTP/1.1\r\n") as client:
        client.settimeout(0.1)
        for _ in range(100):
            client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                assert client.recv(1, socket.MSG_PEEK)
                break
        check_refusal(server, Answer(client), 408, 3007, False, "/healthz")


def test_connection_without_a_request_is_closed(server):
    with connected(server) as client:
        assert client.recv(1) == b""


def test_rest_of_an_answered_body_is_not_waited_for(server):
    """An error is answered before its body is read, which then never comes."""
    before = "from llama_jax.server import connection; connection.LINGER_SILENCE_S = 0.5"
    start = head(9).replace(TOKEN.encode(), b"wrong")
    with served(before=before) as server, connected(server, start) as client:
        assert Answer(client).status == 401
        assert read_all(client) == b""


def test_connection_outlives_an_error(server):
    """Whose body comes after the answer."""
    with connected(server, head(len(KNOWN)).replace(TOKEN.encode(), b"wrong")) as client:
        assert Answer(client).status == 401
        client.sendall(KNOWN + request(KNOWN))
        assert Answer(client).json["result"]["response"] == ANSWER


@pytest.mark.slow
def test_drain_does_not_wait_for_a_stalled_body():
    with served(drain_s=3600) as server, connected(server, head(9) + b"{") as client:
        wait_until(lambda: server.metrics()["num_connections"] == 2)
        server.process.send_signal(signal.SIGTERM)
        check_refusal(server, Answer(client), 503, 5001, False, RUN)
        assert server.end() == 0


# Half-closed connections.


def test_half_closed_client_gets_its_answer(server):
    with connected(server, request(KNOWN)) as client:
        client.shutdown(socket.SHUT_WR)
        assert Answer(client).json["result"]["response"] == ANSWER
        assert client.recv(1) == b""


def test_half_closed_client_gets_its_stream(server):
    with connected(server, request(endless(1), COMPLETIONS)) as client:
        client.shutdown(socket.SHUT_WR)
        assert events_of(Answer(client).text)[-1] == "[DONE]"
        assert client.recv(1) == b""


def test_half_closed_client_gets_all_pipelined_answers(server):
    with connected(server, request(KNOWN) * 3) as client:
        client.shutdown(socket.SHUT_WR)
        data = read_all(client)
    assert data.count(b"HTTP/1.1 200 ") == data.count(ANSWER.encode()) == 3


PROBED = "from llama_jax.server import connection; connection.FIRST_PROBE_S = 0"


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_client_that_is_gone_frees_its_slots(stream):
    """It closed both directions, which looks like a half-close until something is sent."""
    body = endless(128) | {"stream": stream}
    with served(max_queue=None, before=PROBED) as server:
        with connected(server, request(body, COMPLETIONS)):
            wait_until(lambda: server.in_use() > 0)
        server.wait_until_idle()
        [line] = [call for call in server.calls if call["path"] == COMPLETIONS]
        assert line["client_disconnected"]
        assert server.metrics()["generation_tokens_total"] < 128 * 500


@pytest.mark.slow
def test_sign_of_life_does_not_disturb_an_answer():
    data = request(endless(8) | {"stream": False}, COMPLETIONS)
    with served(max_queue=None, before=PROBED) as server, connected(server, data) as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert len(Answer(client).json["choices"]) == 8


# What is refused.


@pytest.mark.parametrize(
    ("data", "status", "path"),
    [
        (b"GET\r\n\r\n", 400, ""),
        (b"\x16\x03\x01\x02\x00\x01", 400, ""),
        (b"\x00" * 1000 + b"\r\n\r\n", 400, ""),
        (b"GET /x HTTP/1.1\r\nno colon\r\n\r\n", 400, "/x"),
        (b"HEAD /x HTTP/1.1\r\nno colon\r\n\r\n", 400, "/x"),
        (b"GET /x HTTP/1.1\r\n\r\n", 400, "/x"),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "/x"),
        (
            b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
            "/x",
        ),
        (b"GET /x HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 300_000, 431, "/x"),
        (head(None) + b"zz\r\n", 400, RUN),
        (head(None) + b"1\r\nabc", 400, RUN),
    ],
)
def test_what_is_not_http_is_refused_in_the_servers_form(server, data, status, path):
    with connected(server, data) as client:
        answer = Answer(client)
        check_refusal(server, answer, status, 6003, False, path)
        assert client.recv(1) == b""
    assert "no colon" not in answer.text
    assert ("https" in answer.text) == data.startswith(b"\x16")


def test_what_is_not_http_has_openais_form_on_openais_routes(server):
    with connected(server, b"POST /v1/completions HTTP/1.1\r\nno colon\r\n\r\n") as client:
        answer = Answer(client)
    check_refusal(server, answer, 400, 6003, True, COMPLETIONS)
    assert answer.json["error"]["code"] == "invalid_http"


def test_refused_request_after_a_good_one(server):
    """The answer of the first is whole, then the second is refused."""
    with connected(server, request(KNOWN) + b"GET\r\n\r\n") as client:
        first, second = read_all(client).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ")
    assert ANSWER.encode() in first
    assert second.startswith(b"400 ")
    assert b"x-request-id" in second


def test_bytes_after_the_last_request_are_ignored(server):
    """They come while the answer is under way, as the line break that old clients add."""
    with connected(server, request(endless(1), COMPLETIONS, "Connection: close")) as client:
        assert client.recv(1, socket.MSG_PEEK)
        client.sendall(b"\r\n\r\n")
        assert events_of(Answer(client).text)[-1] == "[DONE]"


def test_body_far_beyond_the_limit_gets_its_413(server):
    """Though the client reads only after it wrote all of it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", RUN, bytes(100 << 20), {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["errors"][0]["code"]) == (413, 3006)


def test_client_that_asks_before_it_sends_is_not_misread(server):
    """After a refusal its next bytes are its body or a request; so the connection ends."""
    start = head(9, RUN, "Expect: 100-continue").replace(TOKEN.encode(), b"wrong")
    with connected(server, start) as client:
        assert Answer(client).status == 401
        assert client.recv(1) == b""
    with connected(server, head(len(KNOWN), RUN, "Expect: 100-continue")) as client:
        assert client.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(KNOWN)
        assert Answer(client).json["result"]["response"] == ANSWER


def test_upgrade_is_ignored_without_a_word(server):
    lines = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    with connected(server, b"GET /healthz HTTP/1.1\r\n" + lines) as client:
        assert Answer(client).text == "ok\n"
    assert "upgrade" not in server.log.lower()


# Larger bodies than there is room for.


@pytest.mark.slow
def test_stalled_large_bodies_do_not_shut_out_small_requests():
    largest = 1 << 18
    with served(max_body_bytes=largest) as server, contextlib.ExitStack() as stack:
        for _ in range(LARGEST_BODIES):
            stack.enter_context(connected(server, head(largest + 1) + bytes(largest)))
        wait_until(lambda: server.metrics()["request_body_bytes"] == LARGEST_BODIES * largest)
        for path, is_openai in ((RUN, False), (COMPLETIONS, True)):
            with connected(server, request(bytes(largest), path)) as client:
                answer = Answer(client)
                assert answer.headers["retry-after"] == "5"
                check_refusal(server, answer, 503, 5001, is_openai, path)
                assert read_all(client) == b""
        with connected(server, request(KNOWN)) as client:
            assert Answer(client).json["result"]["response"] == ANSWER
        assert healthy(server)
        stack.close()
        wait_until(lambda: server.metrics()["request_body_bytes"] == 0)
        assert server.metrics()['rejections_total{reason="large_bodies"}'] == 2


# More connections than there is room for.


def limited(descriptors, reserved=RESERVED_DESCRIPTORS):
    """Return code that leaves a server so many descriptors."""
    return (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))\n"
        "from llama_jax.server import acceptor\n"
        f"acceptor.RESERVED_DESCRIPTORS = {reserved}\n"
    )


class StubConnection:
    """A connection in some state since some time."""

    transport = "any"

    def __init__(self, admission, state, since):
        self.admission, self.state, self.since = admission, state, since
        self.is_open = True

    def evict(self):
        self.is_open = False
        self.admission.open.discard(self)


def test_longest_idle_connections_make_room_first():
    async def evicted(count):
        now = asyncio.get_running_loop().time()
        admission = Admission(None, 4)
        ages = [
            ("idle long", State.IDLE, 50),
            ("idle", State.IDLE, 5),
            ("idle just now", State.IDLE, 0.1),
            ("head long", State.HEAD, 9),
            ("body", State.BODY, 6),
            ("flushing", State.FLUSHING, 70),
            ("busy", State.BUSY, 500),
        ]
        all_of_them = {name: StubConnection(admission, s, now - age) for name, s, age in ages}
        admission.open = set(all_of_them.values())
        admission.evict(count)
        return {name for name, each in all_of_them.items() if not each.is_open}

    order = ["idle long", "idle", "head long", "body", "idle just now", "flushing"]
    for count in range(8):
        assert asyncio.run(evicted(count)) == set(order[:count])


def test_limit_follows_the_descriptors(monkeypatch):
    chosen = []
    monkeypatch.setattr(acceptor.resource, "setrlimit", lambda _, limits: chosen.append(limits))
    wanted = MAX_CONNECTIONS + RESERVED_DESCRIPTORS
    for soft, hard, limit, raised in (
        (256, 256, 256 - RESERVED_DESCRIPTORS, 256),
        (256, 1024, 1024 - RESERVED_DESCRIPTORS, 1024),
        (1024, 1 << 20, MAX_CONNECTIONS, wanted),
        (1024, acceptor.resource.RLIM_INFINITY, MAX_CONNECTIONS, wanted),
    ):
        monkeypatch.setattr(acceptor.resource, "getrlimit", lambda _, both=(soft, hard): both)
        assert connection_limit() == limit
        assert chosen.pop() == (raised, hard)
    monkeypatch.setattr(acceptor.resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    assert connection_limit() == MAX_CONNECTIONS
    assert not chosen
    monkeypatch.setattr(acceptor.resource, "getrlimit", lambda _: (70, 70))
    with pytest.raises(InputError, match="may open 70 files, expected at least 80; raise it by"):
        connection_limit()


@pytest.mark.slow
def test_busy_connections_are_kept_and_others_refused():
    """16 connections: of these 14 for requests, and two for health checks and refusals."""
    body = endless(1) | {"max_tokens": 200}
    holding = contextlib.ExitStack()
    with served(max_queue=None, before=limited(80)) as server, contextlib.ExitStack() as stack:
        stack.push(holding)
        read_first(holding.enter_context(server.ask("POST", COMPLETIONS, endless(128))))
        clients = [
            stack.enter_context(connected(server, request(body, COMPLETIONS))) for _ in range(13)
        ]
        for client in clients:
            assert client.recv(1, socket.MSG_PEEK)
        for _ in range(20):
            with connected(server, request(KNOWN)) as client:
                answer = Answer(client)
                assert answer.headers["retry-after"] == "5"
                check_refusal(server, answer, 503, 5001, False, RUN)
            assert healthy(server)
        holding.close()
        for client in clients:
            assert events_of(Answer(client).text)[-1] == "[DONE]"
        assert server.metrics()['rejections_total{reason="connections"}'] == 20


def healthy(server):
    with connected(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        return Answer(client).text == "ok\n"


def cpu_s(server):
    stat = pathlib.Path(f"/proc/{server.process.pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_no_descriptor_left_is_no_storm():
    """The limit is set too high here, as if files had taken what was meant for connections."""
    before = limited(128, reserved=-1000)
    with served(before=before) as server, contextlib.ExitStack() as stack:
        lines = server.log.count("\n")
        for _ in range(300):
            stack.enter_context(connected(server))
        began = cpu_s(server)
        time.sleep(2)
        assert cpu_s(server) - began < 1
        assert healthy(server)
        assert server.log.count("accepting connections failed") == 1
        assert server.log.count("\n") - lines < 5


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_stalled_and_idle_clients_do_not_shut_out_others():
    """300 that stop in mid-head and 500 that send nothing, with `ulimit -n 256`."""
    with served(before=limited(256)) as server:
        assert server.post(RUN, {"prompt": QUESTION, "temperature": 0})[0] == 200
        descriptors = f"/proc/{server.process.pid}/fd"
        wait_until(lambda: server.metrics()["num_connections"] == 1)
        before, lines = len(os.listdir(descriptors)), server.log.count("\n")
        with contextlib.ExitStack() as stack:
            for i in range(800):
                data = b"GET /healthz HTTP/1.1\r\nHost" if i < 300 else b""
                stack.enter_context(connected(server, data))
            assert server.log.count("\n") - lines < 5
            for _ in range(5):
                began = time.perf_counter()
                assert healthy(server)
                assert time.perf_counter() - began < 1
                status, body = server.post(RUN, {"prompt": QUESTION, "temperature": 0})
                assert (status, body["result"]["response"]) == (200, ANSWER)
            assert len(os.listdir(descriptors)) < 256
        wait_until(lambda: len(os.listdir(descriptors)) <= before)
        assert server.metrics()['connections_closed_total{reason="evicted"}'] >= 600
