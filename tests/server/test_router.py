"""vllm-router in front of two servers: prefixes that stay, a server that dies, equal texts.

Its figures are printed: `pytest -rP tests/server/test_router.py -m slow`.
"""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import random
import subprocess
import sys
import threading

import pytest

from tests.helpers.processes import free_port
from tests.helpers.server_process import TOKEN, served
from tests.helpers.serving import CHAT, COMPLETIONS, MODEL, wait_until

pytestmark = [pytest.mark.router, pytest.mark.slow]

DIALOGS, TURNS = 4, 4
REQUESTS, CLIENTS = 48, 8
WORDS = [
    "llama",
    "river",
    "stone",
    "bread",
    "window",
    "letter",
    "garden",
    "paper",
    "engine",
    "silver",
    "forest",
    "morning",
]


@pytest.fixture(scope="module")
def servers():
    with served() as one, served() as other:
        yield one, other


class Router:
    """A vllm-router that runs."""

    def __init__(self, port):
        self.port = port

    def get(self, path):
        """Return the status; None: nobody answers."""
        try:
            with self._response("GET", path, None, {}) as response:
                return response.status
        except OSError:
            return None

    def post(self, path, body, **headers):
        """Return the status and the parsed answer."""
        with self._response("POST", path, body, headers) as response:
            content = response.read()
            return response.status, json.loads(content) if response.status == 200 else content

    def chat(self, messages, headers=None, **fields):
        """Return an answer that must come."""
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, **fields}
        status, answer = self.post(CHAT, body, **(headers or {}))
        assert status == 200, answer
        return answer

    @contextlib.contextmanager
    def _response(self, method, path, body, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers
        with contextlib.closing(connection):
            connection.request(method, path, body and json.dumps(body), headers)
            with connection.getresponse() as response:
                yield response


@contextlib.contextmanager
def routed(policy, servers):
    """Run a router that has found its servers healthy."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--host=127.0.0.1"]
    command += [f"--port={port}", f"--prometheus-port={free_port()}", f"--policy={policy}"]
    command += ["--worker-startup-check-interval=1", "--health-check-interval-secs=1"]
    command += ["--worker-urls", *(server.url for server in servers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    router = Router(port)
    try:
        wait_until(lambda: router.get("/health") == 200 or process.poll() is not None, 120)
        assert process.poll() is None, "the router ended"
        yield router
    finally:
        process.kill()
        process.wait(30)


def calls_of(server, path=CHAT):
    """Return the lines of a server's access log about a path."""
    return [call for call in server.calls if call["path"] == path]


def reuse(policy, servers):
    """Return the share of the prompts' tokens that came from a prefix cache.

    So many dialogs go on in turns, in random order. Each has a name and a beginning of its own.
    """
    source = random.Random(7)

    def words(number):
        return " ".join(source.choices(WORDS, k=number))

    dialogs = [[{"role": "system", "content": f"{policy} {words(40)}"}] for _ in range(DIALOGS)]
    tokens = cached = 0
    with routed(policy, servers) as router:
        for _ in range(TURNS):
            for number in source.sample(range(DIALOGS), DIALOGS):
                dialog = dialogs[number]
                dialog.append({"role": "user", "content": words(6)})
                headers = {"X-Session-ID": f"{policy} {number}"}
                answer = router.chat(dialog, headers, temperature=0)
                dialog.append(answer["choices"][0]["message"] | {"role": "assistant"})
                tokens += answer["usage"]["prompt_tokens"]
                cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached / tokens


def test_cache_aware_routing_raises_the_reuse_of_prefixes(servers):
    shares = {p: reuse(p, servers) for p in ("round_robin", "cache_aware", "consistent_hash")}
    for policy, share in shares.items():
        print(f"prompt tokens from a prefix cache, {policy}: {share:.0%}")
    assert shares["cache_aware"] > shares["round_robin"] + 0.1
    assert shares["consistent_hash"] > shares["round_robin"] + 0.1


def test_a_session_stays_on_one_server(servers):
    """By X-Session-ID; both names of sessions reach the servers' logs through the router."""
    names = [f"session {number}" for number in range(16)]
    with routed("consistent_hash", servers) as router:
        for _ in range(3):
            for name in names:
                headers = {"X-Session-ID": name, "x-session-affinity": f"of {name}"}
                router.chat([{"role": "user", "content": "Hello"}], headers, max_tokens=1)
    found = collections.defaultdict(list)
    for number, server in enumerate(servers):
        for call in calls_of(server):
            if call["session_id"] in names:
                assert call["session_affinity"] == f"of {call['session_id']}"
                found[call["session_id"]].append(number)
    assert sorted(found) == sorted(names)
    assert all(len(numbers) == 3 and len(set(numbers)) == 1 for numbers in found.values())
    assert {numbers[0] for numbers in found.values()} == {0, 1}


def test_equal_seeds_give_equal_texts_whichever_server_answers(servers):
    before = [len(calls_of(server)) for server in servers]
    with routed("round_robin", servers) as router:
        messages = [{"role": "user", "content": "Tell me a story."}]
        answers = [
            router.chat(messages, seed=seed, temperature=2, max_tokens=40)
            for seed in (1, 1, 1, 1, 2)
        ]
    assert all(len(calls_of(s)) >= n + 2 for s, n in zip(servers, before, strict=True))
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert len(set(texts[:4])) == 1
    assert texts[4] != texts[0]
    assert len({answer["system_fingerprint"] for answer in answers}) == 1


def test_a_server_that_ends_loses_no_request(servers):
    """From its signal on it refuses, and /health says so; what it was answering goes on."""
    with served() as ending, routed("round_robin", [servers[0], ending]) as router:
        wait_until(lambda: any(call["status"] == 200 for call in calls_of(ending, "/health")))
        body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True}
        body |= {"temperature": 5, "stream": True, "n": 8}
        with ending.ask("POST", COMPLETIONS, body) as response:
            response.readline()
            ending.process.terminate()
            for _ in range(8):
                router.chat([{"role": "user", "content": "Hello"}], max_tokens=1)
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert ending.end() == 0


def test_a_killed_server_loses_no_request(servers):
    """Eight clients at once. The texts are those of a server that nobody kills."""
    fields = {"temperature": 2, "max_tokens": 40, "ignore_eos": True}
    bodies = [
        {"model": MODEL, "messages": [{"role": "user", "content": f"Tell me of {n}"}], "seed": n}
        for n in range(REQUESTS)
    ]
    lost = 0
    began = threading.Semaphore(0)
    with served() as victim, routed("round_robin", [servers[0], victim]) as router:

        def ask(body):
            began.release()
            return router.post(CHAT, body | fields)

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            answers = [pool.submit(ask, body) for body in bodies]
            for _ in range(REQUESTS // 2):
                began.acquire()
            wait_until(lambda: victim.process.poll() is not None or victim.in_use())
            victim.process.kill()
            for body, answer in zip(bodies, answers, strict=True):
                status, got = answer.result()
                lost += status != 200
                if status == 200:
                    _, expected = servers[1].post(CHAT, body | fields)
                    assert got["choices"][0]["message"] == expected["choices"][0]["message"]
        assert calls_of(victim)
    print(f"a server was killed: {lost} of {REQUESTS} requests lost")
    assert lost == 0
