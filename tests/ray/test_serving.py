"""Replicas on Ray Serve: their answers, and what their deaths and ends cost."""

import asyncio
import concurrent.futures
import json
import os
import pathlib
import signal
import time
import warnings
from typing import Any

import pytest

from llama_jax import InputError
from llama_jax.server.openai.requests import parse_completion
from llama_jax.server.service import Service
from llama_jax.server.settings import Settings
from tests.helpers.demo import load_demo
from tests.helpers.processes import END_S, free_port
from tests.helpers.serving import COMPLETIONS, MODEL, wait_until

pytestmark = pytest.mark.ray

httpx: Any = pytest.importorskip("httpx", reason="needs httpx: pip install -e '.[dev]'")
ray = pytest.importorskip("llama_jax.ray", reason="needs the ray extra: pip install -e '.[ray]'")

CLIENTS, SLOTS, TOKEN = 64, 4, "a-token"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=SLOTS)


def app(replicas: int):
    return ray.serve_app(replicas=replicas, slots=SLOTS, max_queue=CLIENTS, api_token=TOKEN)


@pytest.fixture(scope="module")
def url(cluster):
    """The address of two replicas."""
    from ray import serve

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(2), name="llama", logging_config={"log_level": "WARNING"})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def body(i: int, tokens: int = 24) -> dict:
    """A request that no other has."""
    given = {"seed": i + 1, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.8}
    return {"model": MODEL, "prompt": f"Once upon a time {i}", **given}


def expected(llm, i: int, tokens: int = 24) -> str:
    parsed = parse_completion(json.dumps(body(i, tokens)).encode(), (MODEL,), 1)
    return "".join(llm.start(parsed.requests[0]))


def pids() -> list[int]:
    """The processes of the replicas."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_text()
        except OSError:
            continue
        if title.startswith("ray::ServeReplica:llama:"):
            found.append(int(path.parent.name))
    return found


class Client:
    """One client: its session, the replica that answers it, and what it was answered."""

    def __init__(self, url: str, number: int):
        self.number, self.failures, self.replica = number, 0, ""
        headers = HEADERS | {"x-session-id": f"session-{number}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=END_S)

    def whole(self, i: int, tokens: int = 24) -> str | None:
        """Return the text of an answer; None: it failed."""
        try:
            reply = self._http.post(COMPLETIONS, json=body(i, tokens))
        except httpx.TransportError:
            return None
        if reply.status_code != 200:
            return None
        self.replica = reply.headers["x-replica-id"]
        return reply.json()["choices"][0]["text"]

    def stream(self, i: int, tokens: int = 24, events: int | None = None) -> tuple[str, bool]:
        """Return the text that came, and whether it is all; hang up after so many events."""
        text, count = "", 0
        try:
            request = body(i, tokens) | {"stream": True}
            with self._http.stream("POST", COMPLETIONS, json=request) as reply:
                if reply.status_code != 200:
                    return "", False
                for line in reply.iter_lines():
                    if line == "data: [DONE]":
                        return text, True
                    if line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "choices" not in event:
                            return text, False
                        text += "".join(choice["text"] for choice in event["choices"])
                        count += 1
                        if count == events:
                            return text, False
        except httpx.TransportError:
            pass
        return text, False

    def idle(self) -> bool:
        """Whether the replica of this session has nothing to do."""
        metrics = self._http.get("/metrics").text.splitlines()
        names = ("llama_jax_num_requests_running ", "llama_jax_num_requests_waiting ")
        return all(line.endswith(" 0.0") for line in metrics if line.startswith(names))

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def clients(url):
    made = [Client(url, number) for number in range(CLIENTS)]
    yield made
    for client in made:
        client.close()


def each(clients, call) -> list:
    """Call for all clients at once."""
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(call, clients))


def replicas(clients) -> set[str]:
    return {client.replica for client in clients}


@pytest.mark.slow
def test_replicas_answer_many_clients_as_the_engine_does_and_sessions_stay(clients, llm):
    texts = each(clients, lambda client: client.whole(client.number))
    assert texts == [expected(llm, client.number) for client in clients]
    first = [client.replica for client in clients]
    assert len(set(first)) == 2
    streams = each(clients, lambda client: client.stream(client.number + 100))
    assert streams == [(expected(llm, client.number + 100), True) for client in clients]
    each(clients, lambda client: client.whole(client.number, 1))
    assert [client.replica for client in clients] == first


@pytest.mark.slow
def test_clients_that_hang_up_leave_the_replicas_idle(clients, llm):
    each(clients, lambda client: client.stream(client.number, 400, events=2))
    each(clients, lambda client: client.whole(client.number, 1))
    assert len(replicas(clients)) == 2
    wait_until(lambda: all(client.idle() for client in clients), END_S)


@pytest.mark.slow
def test_a_killed_replica_fails_its_own_requests_only_and_comes_again(clients, llm):
    texts = each(clients, lambda client: client.whole(client.number, 1))
    assert None not in texts
    before = {client.number: client.replica for client in clients}
    assert len(pids()) == 2
    failed: set[int] = set()

    def ask(client: Client) -> list[tuple[int, str | None]]:
        """Answers to some requests, each tried until it is answered."""
        answered = []
        for turn in range(6):
            i = client.number + 100 * turn
            deadline = time.monotonic() + END_S
            while True:
                if turn % 2:
                    text, whole = client.stream(i)
                    assert expected_texts[i].startswith(text)
                else:
                    text = client.whole(i)
                    whole = text is not None
                if whole:
                    break
                failed.add(client.number)
                assert time.monotonic() < deadline
                time.sleep(0.2)
            answered.append((i, text))
        return answered

    expected_texts = {
        i: expected(llm, i) for n in range(CLIENTS) for i in (n + 100 * turn for turn in range(6))
    }
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(ask, client) for client in clients]
        wait_until(lambda: any(not client.idle() for client in clients[:8]), END_S)
        os.kill(pids()[0], signal.SIGKILL)
        for answer in answers:
            for i, text in answer.result():
                assert text == expected_texts[i]
    killed = {before[number] for number in failed}
    assert len(killed) == 1
    assert len(failed) <= sum(replica in killed for replica in before.values())

    def recovered() -> bool:
        each(clients, lambda client: client.whole(client.number, 1))
        return len(replicas(clients)) == 2 and len(pids()) == 2

    wait_until(recovered, END_S)
    assert not killed & replicas(clients)


@pytest.mark.slow
def test_a_replica_that_is_to_end_lets_its_streams_end(clients, llm):
    from ray import serve

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(client.stream, client.number, 200) for client in clients[:16]]
        wait_until(lambda: any(not client.idle() for client in clients[:16]), END_S)
        serve.run(app(1), name="llama", logging_config={"log_level": "WARNING"})
        texts = [stream.result() for stream in streams]
    assert texts == [(expected(llm, client.number, 200), True) for client in clients[:16]]
    wait_until(lambda: len(pids()) == 1, END_S)
    each(clients, lambda client: client.whole(client.number, 1))
    assert len(replicas(clients)) == 1


# Without Ray Serve.


@pytest.mark.parametrize("fails", [False, True])
def test_an_application_has_started_when_its_model_is_warm(llm, fails):
    service = Service(llm, Settings(warm_up=False))
    sent: list[str] = []

    async def start() -> None:
        ending = asyncio.Event()
        messages = iter([{"type": "lifespan.startup"}])

        async def receive():
            if (message := next(messages, None)) is not None:
                return message
            await ending.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message):
            sent.append(message["type"])

        ready, service._warm.set = service._warm.set, lambda: None
        running = asyncio.create_task(
            ray.serving.ready_when_warm(service, "a")({"type": "lifespan"}, receive, send)
        )
        await asyncio.sleep(0.3)
        assert sent == []
        if fails:
            service.failed = True
        else:
            ready()
        while not sent:
            await asyncio.sleep(0.01)
        ending.set()
        await running

    asyncio.run(start())
    assert sent[0] == ("lifespan.startup.failed" if fails else "lifespan.startup.complete")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"replicas": 0}, "replicas is 0, expected one number from 1, or two"),
        ({"replicas": [3, 2]}, r"replicas is \[3, 2\], expected"),
        ({"cores": 0}, "cores is 0, expected a whole number from 1"),
        ({"gpus": 1.5}, "gpus is 1.5, expected 0, a part of 1, or a whole number"),
        ({"timeout_s": 0}, "timeout_s is 0, expected a positive number"),
    ],
)
def test_an_application_that_cannot_be_is_refused(given, problem):
    with pytest.raises(InputError, match=problem):
        ray.serve_app(**given)
