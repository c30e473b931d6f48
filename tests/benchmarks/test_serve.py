"""The serving benchmark: its load, its arithmetic, and that it runs. Never how fast."""

import asyncio
import contextlib
import json

import pytest

from llama_jax.errors import InputError
from tests.helpers.measuring import measure

pytest.importorskip("httpx_sse", reason="needs the bench extra")

from benchmarks import batch_interference, load, serve
from benchmarks.load import (
    Answer,
    Point,
    drive,
    make_points,
    make_prompts,
    poisson,
    prompts_of,
    spread,
    summarise,
)
from benchmarks.prefill_interference import compare
from benchmarks.servers import PEERS, Launch, Server
from benchmarks.shapes import load_shape

CONFIG = load_shape("demo")
USAGE = {"prompt_tokens": 7, "completion_tokens": 4}


def event(text="", **fields):
    choice = {"index": 0, "text": text, "finish_reason": fields.pop("finish_reason", None)}
    return b"data: " + json.dumps({"choices": [choice]} | fields).encode() + b"\n\n"


END = event(finish_reason="length", usage=USAGE)
NO_USAGE = event(finish_reason="length")


def ask(tmp_path, parts, *, point=None, status="200 OK", pause_s=0.02):
    """Drive a server that answers every request by these parts; return answers and figures."""
    point = point or Point("closed", 1, 1)
    busy, most = 0, 0

    async def handle(reader, writer):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        try:
            await reader.readuntil(b"\r\n\r\n")
            head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: text/event-stream"
            writer.write(head.encode() + b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
        finally:
            busy -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def call():
        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        launch = Launch("ours", "float16", CONFIG, None, tmp_path, 1, 64)
        prompts = make_prompts(CONFIG.vocab_size, point.requests, 7)
        async with listener:
            return await asyncio.to_thread(drive, Server(launch, url), point, prompts, 4)

    answers, figures = asyncio.run(call())
    return answers, figures, most


def test_an_answer_is_read_as_it_came(tmp_path):
    (answer,), figures, _ = ask(tmp_path, [event("ab"), event("c") + event("d"), END])
    assert answer.error is None
    assert (answer.prompt_tokens, answer.tokens) == (7, 4)
    assert [tokens for _, tokens in answer.bursts()] == [2, 2]
    assert (figures["requests"], figures["errors"], figures["tokens"]) == (1, 0, 4)


def test_text_without_usage_counts_characters(tmp_path):
    (answer,), _, _ = ask(tmp_path, [event("abc"), NO_USAGE])
    assert (answer.error, answer.prompt_tokens, answer.tokens) == (None, 0, 3)


@pytest.mark.parametrize(
    ("parts", "status", "expected"),
    [
        ([b"busy"], "503 Busy", "ValueError: status 503: busy"),
        ([event("ab")], "200 OK", "cut off: the stream has no finish_reason"),
        ([event("a", error={"m": 1}), END], "200 OK", "reported in the stream: {'m': 1}"),
        ([b"data: {]\n\n"], "200 OK", "JSONDecodeError"),
    ],
    ids=["status", "no end", "an error's event", "no JSON"],
)
def test_failed_requests_are_counted_and_in_no_other_figure(tmp_path, parts, status, expected):
    (answer,), figures, _ = ask(tmp_path, parts, status=status)
    assert expected in answer.error
    assert (figures["requests"], figures["errors"], figures["tokens"]) == (1, 1, 0)


def test_a_server_that_hangs_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "TIMEOUT_S", 0.2)
    (answer,), _, _ = ask(tmp_path, [event("ab"), b""], pause_s=1)
    assert answer.error == "no whole answer within 0.2 s"


def test_clients_of_a_closed_loop_wait_for_their_answers(tmp_path):
    answers, _, most = ask(tmp_path, [event("ab"), END], point=Point("closed", 3, 10))
    assert len(answers) == 10
    assert most <= 3


def test_an_open_loop_waits_for_nobody(tmp_path):
    point = Point("open", 1000, 5)
    answers, _, most = ask(tmp_path, [event("ab"), END], point=point, pause_s=0.3)
    assert most == len(answers) == 5


def test_arrivals_are_poisson_and_follow_from_their_seed():
    times = poisson(4.0, 2000, seed=3)
    assert times == poisson(4.0, 2000, seed=3) != poisson(4.0, 2000, seed=4)
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] / 1999 == pytest.approx(0.25, rel=0.1)


def test_only_prompts_with_a_shared_prefix_begin_alike():
    prompts = make_prompts(32000, 8, 16)
    assert {len(prompt) for prompt in prompts} == {16}
    assert len({tuple(prompt[:2]) for prompt in prompts}) == 8
    shared = make_prompts(32000, 8, 16, shared=True)
    assert len({tuple(prompt[:12]) for prompt in shared}) == 1
    assert len({tuple(prompt) for prompt in shared}) == 8


def test_no_load_has_a_prompt_of_another():
    """A server that kept it would not read it again."""
    points = make_points([8, 32], ["2.5"], 32, shared=True)
    assert {point.requests for point in points} == {32}
    prompts = prompts_of(points, 32000, 16)
    assert list(prompts) == points
    begins = [{tuple(prompt[:2]) for prompt in own} for own in prompts.values()]
    assert len(set.union(*begins)) == sum(map(len, begins))


def test_loads_are_made_of_the_flags():
    points = make_points([1, 4], ["2.5"], 32, shared=True)
    assert [(str(point), point.requests) for point in points] == [
        ("1 client", 16),
        ("4 clients", 32),
        ("2.5 requests/s", 32),
        ("4 clients, shared prefix", 32),
    ]
    for clients, rate, expected in (([], "1", "--clients is empty"), ([1], "x", "--rate has 'x'")):
        with pytest.raises(InputError, match=expected):
            make_points(clients, [rate], 32, shared=False)


def test_percentiles_are_values_that_occurred():
    assert spread(range(1, 201)) == {"p50": 100, "p99": 198, "max": 200}
    assert spread([3, 1, 2]) == {"p50": 2, "p99": 3, "max": 3}
    assert spread([]) == {"p50": None, "p99": None, "max": None}


def test_tokens_of_a_burst_share_the_time_it_was_waited_for():
    answer = Answer(0.0, 4.0, [(1.0, 2), (3.0, 1), (3.0005, 3)], 7, 6, True)
    figures = summarise([answer, Answer(0.0, 9.0, error="late")], 4.0)
    assert figures["per_burst_s"]["p50"] == 2.0
    assert figures["per_token_s"] == {"p50": 0.5, "p99": 0.5, "max": 0.5}
    assert figures["first_token_s"]["p50"] == 1.0
    assert figures["tokens_per_s"] == 1.5
    assert figures["end_to_end_s"]["max"] == 4.0


def test_waits_beside_a_prompt_are_compared_with_the_others():
    waits = [(0, 1), (1, 2), (2, 5), (5, 6.5), (6.5, 7.5)]
    waits += [(0.5, 1.5), (1.5, 3.5), (3.5, 6), (6, 7), (7, 9)]
    figures = compare(waits, steady=0.5, ended=7.5, admissions=[(1.8, 5.5)])
    # Idle: 1-2 ends behind 1.8; so 0.5-1.5, 6-7 and 6.5-7.5. 7-9 ends too late.
    assert figures["idle_s"] == {"p50": 1.0, "p99": 1.0, "max": 1.0}
    assert figures["during_s"] == {"p50": 2.0, "p99": 3.0, "max": 3.0}
    assert figures["max_ratio"] == 3.0
    assert compare([], 0.0, 1.0, [])["max_ratio"] is None


def test_waits_beside_a_batch_are_reported():
    waits = {"p50_s": 0.25, "p90_s": 0.5, "p99_s": 1.0}
    beside = {"p50_s": 0.5, "p90_s": 0.75, "p99_s": 1.25}
    found = {"alone": waits, "beside": beside, "p99_ratio": 1.25, "lines": 12}
    report = batch_interference.make_report(found).splitlines()
    assert report[-3].split() == ["without", "a", "batch", "250", "500", "1,000"]
    assert report[-2].split() == ["beside", "a", "batch", "500", "750", "1,250"]
    assert report[-1].startswith("12 lines ")
    assert report[-1].endswith(" 1.25 times that without a batch")
    assert batch_interference.FLAGS["batch_slots"].default == "all"


def test_ratios_are_of_rounds_that_both_have():
    ours, theirs = ([{"tokens_per_s": rate} for rate in rates] for rates in ((4, 9, 8), (2, 3, 1)))
    assert serve.ratio(ours, theirs) == 3
    assert serve.ratio(ours, [None, *theirs[1:]]) == 5.5
    assert load.median([{"a": 1, "b": {"c": None}}, {"a": 3, "b": {"c": 5}}]) == {
        "a": 2,
        "b": {"c": 5},
    }


def test_the_same_request_goes_to_every_server(tmp_path):
    for name in ("ours", *PEERS):
        launch = Launch(name, "float16", CONFIG, None, tmp_path, 2, 24, "llama-server")
        body = launch.body([5, 6, 7], 8)
        assert (body["max_tokens"], body["temperature"], body["stream"]) == (8, 0, True)
        assert len(body["prompt"]) == 3
        assert all(isinstance(part, str) for part in launch.command(1234))


@pytest.mark.slow
def test_serving_end_to_end(tmp_path):
    sizes = ("--slots=2", "--prompt_len=16", "--new_tokens=8", "--requests=8")
    record = measure("serve", tmp_path, *sizes, "--clients=1,4", "--rate=20")
    assert record["failures"] == []
    assert len(record["points"]) == 4
    for row in record["points"]:
        figures = row["median"]
        assert (figures["requests"], figures["errors"]) == (8, 0)
        assert (figures["prompt_tokens"], figures["tokens"]) == (8 * 16, 8 * 8)
    (batch,) = record["batches"]
    assert batch["median"]["tokens"] == 64
    assert batch["ours_over_this"] > 0


@pytest.mark.exhaustive
def test_prefill_interference_end_to_end(tmp_path):
    record = measure("prefill_interference", tmp_path, "--slots=3", "--prompt_len=100")
    figures = record["prefill_interference"][0]["median"]
    assert figures["streams"] == 2
    assert figures["max_ratio"] > 0


@pytest.mark.exhaustive
def test_batch_interference_end_to_end(tmp_path):
    flags = ["--slots=3", "--prompt_len=16", "--new_tokens=4", "--line_tokens=100"]
    record = measure("batch_interference", tmp_path, *flags, "--requests=5", "--rate=5")
    figures = record["batch_interference"][0]["median"]
    assert figures["p99_ratio"] > 0
    assert figures["alone"]["p99_s"] > 0
