"""The bodies of all requests together: they are counted, bounded, and given back at every end."""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import threading

import pytest

from llama_jax.server import workers_ai
from llama_jax.server.body_budget import LARGEST_BODIES, SMALL_BYTES
from llama_jax.server.in_thread import in_thread
from tests.helpers.demo import load_demo
from tests.helpers.serving import COMPLETIONS, RUN, RawCall, make_app, paused

PART = 2**14
LARGEST = 2**18
LIMIT = LARGEST_BODIES * LARGEST
SMALL_REQUEST = json.dumps({"prompt": "x", "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=4)


class Upload(RawCall):
    """A request whose body comes in parts; one that is not whole waits for its client."""

    def __init__(self, body, path=RUN, is_whole=True, on_part=lambda: None):
        super().__init__(path, None)
        parts = [body[start : start + PART] for start in range(0, len(body), PART)]
        self._messages = [
            {"type": "http.request", "body": part, "more_body": not is_whole or i < len(parts) - 1}
            for i, part in enumerate(parts)
        ][::-1]
        self._on_part = on_part

    async def _receive(self):
        self._on_part()
        await asyncio.sleep(0)  # for the others' parts to come between
        return await super()._receive()

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def json(self):
        return json.loads(b"".join(message.get("body", b"") for message in self.sent))


@contextlib.asynccontextmanager
async def running(llm, **settings):
    app = make_app(llm, **{"max_body_bytes": LARGEST, **settings})
    async with app.router.lifespan_context(app):
        while not app.state.service.ready:
            await asyncio.sleep(0.01)
        yield app


def held(app):
    """Return the bytes counted now."""
    [text] = re.findall(rb"^llama_jax_request_body_bytes (\S+)$", app.state.metrics.render(), re.M)
    return int(float(text))


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def stalled(app, bodies, size=LARGEST):
    """Have so many clients send so much of a body, and no more."""
    calls = [Upload(bytes(size), is_whole=False) for _ in range(bodies)]
    tasks = [asyncio.create_task(call.run(app)) for call in calls]
    await until(lambda: held(app) == bodies * size)
    try:
        yield
    finally:
        for call in calls:
            call.hang_up.set()
        await asyncio.gather(*tasks)


def test_large_bodies_share_a_bound(llm):
    """Those that do not fit are refused, however their parts are mixed; the others go on."""

    async def run():
        async with running(llm) as app:
            counts = []
            calls = [
                Upload(bytes(LARGEST - PART), path, False, lambda: counts.append(held(app)))
                for path in [RUN, COMPLETIONS] * LARGEST_BODIES * 2
            ]
            tasks = [asyncio.create_task(call.run(app)) for call in calls]
            await until(lambda: sum(call._messages == [] for call in calls) >= LARGEST_BODIES)
            await until(lambda: held(app) % (LARGEST - PART) == 0)
            refused = [call for call in calls if call.sent]
            assert held(app) == (len(calls) - len(refused)) * (LARGEST - PART)
            assert LIMIT - LARGEST < max(counts) <= LIMIT
            for call in calls:
                call.hang_up.set()
            await asyncio.gather(*tasks)
            assert held(app) == 0
            return refused

    refused = asyncio.run(run())
    assert {call._scope["path"] for call in refused} == {RUN, COMPLETIONS}
    for call in refused:
        assert (call.status, call.headers["retry-after"]) == (503, "5")
        assert call.headers["connection"] == "close"
        is_openai = call._scope["path"] == COMPLETIONS
        assert call.json["error"]["code"] == ("service_unavailable" if is_openai else "5001")
        assert "too many large requests" in call.json["error"]["message"]


def test_small_bodies_are_accepted_beside_large_ones_that_stall(llm):
    async def run():
        async with running(llm) as app, stalled(app, LARGEST_BODIES):
            padding = b" " * (SMALL_BYTES - len(SMALL_REQUEST))
            answers = []
            for body in (SMALL_REQUEST, SMALL_REQUEST + padding, SMALL_REQUEST + padding + b" "):
                await (call := Upload(body)).run(app)
                answers.append(call.status)
            return answers

    assert asyncio.run(run()) == [200, 200, 503]


def test_rest_of_a_body_that_is_too_large_does_not_count(llm):
    """It is read and discarded."""

    async def run():
        async with running(llm) as app:
            counts = []
            call = Upload(bytes(2 * LARGEST), RUN, False, lambda: counts.append(held(app)))
            task = asyncio.create_task(call.run(app))
            await until(lambda: not call._messages and held(app) == 0)
            assert max(counts) == LARGEST
            assert not task.done()
            call.hang_up.set()
            await task

    asyncio.run(run())


def test_body_counts_while_its_request_waits_for_a_slot(llm):
    async def run():
        async with running(llm) as app:
            body = SMALL_REQUEST + b" " * PART
            with paused(llm):
                task = asyncio.create_task((call := Upload(body)).run(app))
                await until(lambda: llm.engine.queued == 1)
                assert held(app) == len(body)
            await task
            return call.status, held(app)

    assert asyncio.run(run()) == (200, 0)


ENDS = {
    "answer": (200, SMALL_REQUEST + b" " * SMALL_BYTES, {}),
    "stream": (200, SMALL_REQUEST[:-1] + b', "stream": true}' + b" " * SMALL_BYTES, {}),
    "not JSON": (400, bytes(LARGEST), {}),
    "wrong value": (400, b'{"prompt": 1}' + b" " * SMALL_BYTES, {}),
    "no route": (404, bytes(LARGEST), {"path": "/nope"}),
    "too long a prompt": (413, json.dumps({"prompt": "word " * 9999}).encode(), {}),
    "too large": (413, bytes(2 * LARGEST), {}),
    "far too large": (413, bytes(9 * LARGEST), {"is_whole": False}),
    "stalls": (408, bytes(LARGEST), {"is_whole": False}),
}


@pytest.mark.parametrize(("status", "body", "options"), ENDS.values(), ids=ENDS)
def test_each_end_gives_the_bytes_back(llm, monkeypatch, status, body, options):
    monkeypatch.setattr("llama_jax.server.body.SILENCE_S", 0.05)

    async def run():
        async with running(llm) as app:
            await (call := Upload(body, **options)).run(app)
            return call.status, held(app)

    assert asyncio.run(run()) == (status, 0)


def test_a_request_whose_client_leaves_before_its_end_is_not_run(llm, monkeypatch):
    """What came of it is a whole request by itself."""
    submitted = []
    monkeypatch.setattr(llm.engine, "submit", lambda *given, **_: submitted.append(given))

    async def run():
        async with running(llm) as app:
            call = Upload(SMALL_REQUEST, is_whole=False)
            task = asyncio.create_task(call.run(app))
            await until(lambda: held(app) == len(SMALL_REQUEST))
            call.hang_up.set()
            await asyncio.wait([task])
            assert (call.sent, submitted) == ([], [])

    asyncio.run(run())


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("end", ["disconnected", "cancelled"])
def test_requests_without_an_answer_give_the_bytes_back(llm, is_whole, end):
    async def run():
        async with running(llm) as app:
            body = SMALL_REQUEST + b" " * SMALL_BYTES
            with paused(llm):
                call = Upload(body, is_whole=is_whole)
                task = asyncio.create_task(call.run(app))
                await until(lambda: llm.engine.queued == is_whole and held(app) == len(body))
                call.hang_up.set() if end == "disconnected" else task.cancel()
                await asyncio.wait([task])
            assert not call.sent
            return held(app)

    assert asyncio.run(run()) == 0


def test_body_of_a_disconnected_client_counts_until_its_thread_ends(llm, monkeypatch):
    parsing, going_on = threading.Event(), threading.Event()

    def slow_parse(body):
        parsing.set()
        assert going_on.wait(60)
        raise AssertionError("nobody reads this")

    monkeypatch.setattr(workers_ai, "_parse", slow_parse)

    async def run():
        async with running(llm) as app:
            task = asyncio.create_task((call := Upload(SMALL_REQUEST)).run(app))
            await until(parsing.is_set)
            call.hang_up.set()
            done, _ = await asyncio.wait([task], timeout=0.1)
            assert not done
            assert held(app) == len(SMALL_REQUEST)
            going_on.set()
            await task
            return held(app)

    assert asyncio.run(run()) == 0


def test_function_of_a_cancelled_caller_is_not_called_late():
    called = []

    async def run():
        loop, going_on = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        first = asyncio.create_task(in_thread(going_on.wait, 60))
        second = asyncio.create_task(in_thread(called.append, "called"))
        third = asyncio.create_task(
            in_thread(called.append, "called", on_cancel=lambda: called.append("cancelled"))
        )
        await asyncio.sleep(0)
        third.cancel()
        await until(lambda: called == ["cancelled"])
        going_on.set()
        await asyncio.wait([first, second, third])
        return first.result(), third.cancelled()

    assert asyncio.run(run()) == (True, True)
    assert called == ["cancelled", "called"]
