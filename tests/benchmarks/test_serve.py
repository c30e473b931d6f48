"""The serving benchmark: its load, its arithmetic, its record, and that it runs. Never how fast."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter

import jsonschema
import pytest
from absl.testing import flagsaver

from benchmarks import serve as program
from benchmarks.load import vocabulary
from benchmarks.load.answer import Answer, Burst, read_answer
from benchmarks.load.arrivals import closed_loop, open_loop, poisson
from benchmarks.load.client import HOST, Recording, ask, connect, encode
from benchmarks.load.gap import compare, measure_gap
from benchmarks.load.measure import Load, Measured, without_paths
from benchmarks.load.points import make_points
from benchmarks.load.programs import PROGRAMS, Launch
from benchmarks.load.prompts import Prompts
from benchmarks.load.record import make_record, median
from benchmarks.load.report import make_report
from benchmarks.load.server import running
from benchmarks.load.stats import percentile, summarise
from benchmarks.shapes import load_shape
from benchmarks.worker import EngineError
from tests.helpers import ROOT

REQUEST = encode("/v1/completions", {"prompt": [5], "stream": True})


# A server that sends what a test wants.


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text="", **fields):
    choice = {"index": 0, "text": text, "finish_reason": fields.pop("finish_reason", None)}
    return b"data: " + json.dumps({"choices": [choice]} | fields).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
END = event(finish_reason="length", usage=USAGE)
NOTHING = event(usage={"prompt_tokens": 0, "completion_tokens": 0})
WHOLE = [
    HEAD + chunk(event("ab")),
    chunk(event("c")) + chunk(event("d")),
    chunk(END) + chunk(NOTHING) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
]


@contextlib.asynccontextmanager
async def stub(parts, pause_s=0.0, seen=None):
    """Run a server that answers each request with the same bytes, part by part; yield its port."""

    tasks = []

    async def handle(reader, writer):
        tasks.append(asyncio.current_task())
        began = time.perf_counter()
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        body = json.loads(await reader.readexactly(length))
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        if seen is not None:
            seen.append((began, time.perf_counter(), body))

    server = await asyncio.start_server(handle, HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer(parts, *, timeout_s=10.0, pause_s=0.02):
    """Ask a stub that answers with these parts."""

    async def run():
        async with stub(parts, pause_s) as port:
            return await ask(port, REQUEST, timeout_s=timeout_s)

    return read_answer(asyncio.run(run()))


def test_an_answer_is_read_as_it_came():
    got = answer(WHOLE)
    assert got.error is None
    assert (got.prompt_tokens, got.tokens) == (7, 4)  # not the zeros that come last
    assert [burst.tokens for burst in got.bursts] == [2, 2]
    ((gap, burst),) = got.gaps
    assert burst is got.bursts[1]
    assert 0.015 < gap < 5
    assert 0 < got.first_token_s < got.ended - got.began


def test_text_is_the_same_however_it_is_cut():
    data = b"".join([HEAD, chunk(event("𠀃")), chunk(event("é")), chunk(END), b"0\r\n\r\n"])
    for place in range(1, len(data)):
        recording = Recording(1.0, [(2.0, data[:place]), (3.0, data[place:])])
        got = read_answer(recording)
        assert got.error is None, place
        assert sum(burst.tokens for burst in got.bursts) == 4
        assert {burst.time for burst in got.bursts} <= {2.0, 3.0}
        assert got.ended == 3.0


def test_text_without_usage_counts_characters():
    got = answer([HEAD + chunk(event("abc")) + chunk(event(finish_reason="stop")) + b"0\r\n\r\n"])
    assert (got.error, got.prompt_tokens, got.tokens) == (None, None, 3)


def test_a_chat_has_deltas():
    data = b'data: {"choices":[{"delta":{"content":"ab"}}]}\n\n'
    end = b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
    got = answer([HEAD + chunk(data) + chunk(end) + b"0\r\n\r\n"])
    assert (got.error, got.tokens) == (None, 2)


def test_an_empty_answer_is_one():
    got = answer([HEAD + chunk(event(finish_reason="stop")) + b"0\r\n\r\n"])
    assert (got.error, got.tokens, got.first_token_s, got.gaps) == (None, 0, None, [])


REFUSED = b'HTTP/1.1 503 Busy\r\ncontent-length: 14\r\n\r\n{"error":"no"}'


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([REFUSED], 'status 503: {"error":"no"}'),
        ([], "RemoteDisconnected"),
        ([b"SSH-2.0 hello\r\n"], "BadStatusLine"),
        ([WHOLE[0]], "cut off: the stream has no finish_reason"),
        ([HEAD + chunk(event("ab")) + b"0\r\n\r\n"], "cut off: the stream has no finish_reason"),
        ([HEAD + chunk(event("a", error={"m": 1})) + b"0\r\n\r\n"], "told in the stream: {'m': 1}"),
        ([HEAD + chunk(b"data: {]\n\n") + b"0\r\n\r\n"], "JSONDecodeError"),
    ],
    ids=["status", "nothing", "no HTTP", "broken off", "no end", "an error's event", "no JSON"],
)
def test_what_goes_wrong_is_told(parts, expected):
    assert expected in answer(parts).error


def test_a_server_that_hangs_times_out():
    began = time.perf_counter()
    got = answer([WHOLE[0], b""], timeout_s=0.2, pause_s=30)
    assert got.error == "no whole answer within 0.2 s"
    assert time.perf_counter() - began < 10
    assert [burst.tokens for burst in got.bursts] == [2]


def test_no_server_is_an_error():
    async def run():
        async with stub(WHOLE) as port:
            pass
        return await ask(port, REQUEST, timeout_s=5)

    assert "ConnectionRefusedError" in read_answer(asyncio.run(run())).error


def test_a_stream_can_be_watched_and_left():
    async def run():
        seen = []
        async with stub(WHOLE, 0.05, seen) as port:
            connection = await connect(port, REQUEST)
            while not connection.arrivals:
                await asyncio.sleep(0.01)
            connection.abort()
            await connection.closed
            while not seen:
                await asyncio.sleep(0.01)
            return connection

    connection = asyncio.run(run())
    assert connection.bursts == len(connection.arrivals) < len(WHOLE)


# When requests are sent.


def requests(count):
    return [encode("/", {"number": i}) for i in range(count)]


def test_clients_of_a_closed_loop_wait_for_their_answers():
    async def run():
        seen = []
        async with stub(WHOLE, 0.01, seen) as port:

            async def send(request, due):
                assert due is None
                return await ask(port, request, timeout_s=10)

            recordings = await closed_loop(send, requests(10), clients=3)
        return seen, recordings

    seen, recordings = asyncio.run(run())
    assert sorted(body["number"] for _, _, body in seen) == list(range(10))
    assert all(read_answer(recording).error is None for recording in recordings)
    for began, _, _ in seen:
        assert sum(b <= began < e for b, e, _ in seen) <= 3


def test_an_open_loop_waits_for_nobody():
    async def run():
        seen = []
        async with stub(WHOLE, 0.2, seen) as port:

            async def send(request, due):
                return await ask(port, request, timeout_s=10, due=due)

            recordings = await open_loop(send, requests(5), [0.0, 0.01, 0.02, 0.03, 0.04])
        return seen, recordings

    seen, recordings = asyncio.run(run())
    assert max(began for began, _, _ in seen) < min(ended for _, ended, _ in seen)
    due = [recording.began - recordings[0].began for recording in recordings]
    assert due == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])


def test_a_request_that_is_sent_late_has_waited():
    async def run():
        async with stub(WHOLE) as port:
            return await ask(port, REQUEST, timeout_s=10, due=time.perf_counter() - 1)

    assert read_answer(asyncio.run(run())).first_token_s > 1


def test_arrivals_follow_from_their_seed():
    times = poisson(4.0, 2000, seed=3)
    assert times == poisson(4.0, 2000, seed=3)
    assert times != poisson(4.0, 2000, seed=4)
    assert times[0] == 0
    assert times == sorted(times)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.1)
    # Exponential: its deviation is its mean.
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)


def test_points():
    points = make_points([4, 1], ["2.5", "80%"], 32, shared=True)
    assert [(str(point), point.requests) for point in points] == [
        ("1 client", 16),
        ("4 clients", 32),
        ("2.5 requests/s", 32),
        ("80% of capacity", 32),
        ("4 clients, shared prefix", 32),
    ]
    assert [point.rate(10.0) for point in points] == [None, None, 2.5, 8.0, None]


def test_only_the_most_slots_get_all_loads(tmp_path):
    points = tuple(make_points([1, 4], ["80%"], 8, shared=True))
    load = Load(points, 16, 8, 1, 60.0, 0, True, None)
    few, most = (
        Launch("ours", "float16", load_shape("demo"), None, tmp_path, slots, 24) for slots in (1, 2)
    )
    assert load.saturated == points[1]
    assert load.points_of(most, 2) == points
    assert load.points_of(few, 2) == (points[1],)
    prompts = load.prompts(1024)
    assert {point: len(made) for point, made in prompts.items()} == dict.fromkeys(points, 8)
    assert len({tuple(p.tokens[:12]) for p in prompts[points[3]]}) == 1


# What is asked for.


def test_prompts_begin_differently():
    prompts = Prompts(1024, seed=1)
    made = prompts.make(100, 16, 8) + prompts.make(100, 16, 8)
    assert {len(prompt.tokens) for prompt in made} == {16}
    assert len({prompt.tokens[0] for prompt in made}) == 200
    assert all(3 <= token < 1024 for prompt in made for token in prompt.tokens)
    assert made[:100] == Prompts(1024, seed=1).make(100, 16, 8)
    assert made[:100] != Prompts(1024, seed=2).make(100, 16, 8)
    shared = prompts.make(50, 16, 8, shared=12)
    assert len({tuple(prompt.tokens[:12]) for prompt in shared}) == 1
    assert len({prompt.tokens[12] for prompt in shared}) == 50
    assert shared[0].tokens[0] not in {prompt.tokens[0] for prompt in made}


def test_a_token_is_a_character(tmp_path):
    from llama_jax.text.tokenizer import StreamDecoder, Tokenizer

    path = tmp_path / "tokenizer.model"
    vocabulary.write_sentencepiece(path, 1024)
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == 1024
    tokens = list(range(3, 1024))
    decoder = StreamDecoder(tokenizer)
    assert [len(decoder.push(token)) for token in tokens] == [1] * len(tokens)
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens


@pytest.mark.parity
def test_a_token_is_a_character_for_transformers(tmp_path):
    from transformers import AutoTokenizer

    vocabulary.write_huggingface(tmp_path, 1024)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = list(range(3, 1024))
    text = vocabulary.text_of(tokens)
    assert len(text) == len(tokens)
    assert tokenizer(text)["input_ids"] == tokens
    assert tokenizer.decode(tokens) == text


def test_a_token_is_a_character_for_llamacpp(tmp_path):
    pytest.importorskip("gguf", reason="needs the bench extra")
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the bench extra")
    from benchmarks.load.files import write_gguf

    write_gguf(tmp_path / "gguf", load_shape("demo"), "float16")
    llama = llama_cpp.Llama(str(tmp_path / "gguf"), vocab_only=True, verbose=False)
    tokens = list(range(3, 1024))
    text = vocabulary.text_of(tokens)
    assert llama.tokenize(text.encode(), add_bos=True) == tokens
    assert llama.detokenize(tokens).decode() == text
    llama.close()


# Figures.


def test_percentiles_are_values():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.2) == 1.0
    assert percentile(values, 0.21) == 2.0
    assert percentile(values, 0.99) == 5.0
    assert percentile(values, 1.0) == 5.0
    assert percentile([7.0], 0.5) == 7.0
    assert percentile([], 0.5) is None
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile(range(1, 201), 0.99) == 198


def test_figures_of_a_round():
    first = Answer(10.0, 12.0, [Burst(10.5, 1), Burst(11.0, 4), Burst(11.2, 2)], 3, 7, None)
    second = Answer(10.0, 11.0, [Burst(10.1, 1)], 3, 1, None)
    empty = Answer(10.0, 10.4, [], 3, 0, None)
    failed = dataclasses.replace(first, error="status 500")
    figures = summarise([first, second, empty, failed], 4.0)
    assert (figures["requests"], figures["errors"]) == (4, 1)
    assert (figures["prompt_tokens"], figures["tokens"]) == (9, 8)
    assert (figures["tokens_per_s"], figures["requests_per_s"]) == (2.0, 0.75)
    assert figures["tokens_per_burst"] == 2.0
    assert figures["first_token_s"] == pytest.approx({"p50": 0.1, "p99": 0.5, "max": 0.5})
    assert figures["per_burst_s"] == pytest.approx({"p50": 0.2, "p99": 0.5, "max": 0.5})
    # Four tokens waited 0.5 s together, two 0.2 s.
    assert figures["per_token_s"] == pytest.approx({"p50": 0.125, "p99": 0.125, "max": 0.125})
    assert figures["end_to_end_s"] == {"p50": 1.0, "p99": 2.0, "max": 2.0}
    none = {"p50": None, "p99": None, "max": None}
    assert summarise([failed], 1.0)["first_token_s"] == none


def test_waits_beside_a_prompt():
    streams = [[0.0, 1.0, 2.0, 5.0, 6.5, 7.5], [0.5, 1.5, 3.5, 6.0, 7.0, 9.0]]
    gaps = [gap for times in streams for gap in itertools.pairwise(times)]
    figures = compare(gaps, steady=0.5, ended=7.5, admissions=[(1.8, 5.5)])
    # Idle: 1-2 ends behind 1.8; so 0.5-1.5, 6.0-7.0 and 6.5-7.5. 7.0-9.0 ends too late.
    assert figures["idle_s"] == {"p50": 1.0, "p99": 1.0, "max": 1.0}
    assert figures["during_s"] == {"p50": 2.0, "p99": 3.0, "max": 3.0}
    assert (figures["p99_ratio"], figures["max_ratio"]) == (3.0, 3.0)
    assert figures["first_token_s"] == pytest.approx(3.7)
    assert len(figures["gaps"]) == 8
    assert compare([], 0.0, 1.0, [])["max_ratio"] is None


def test_medians_of_nested_figures():
    rounds = [{"a": 1, "b": {"c": 5.0, "d": None}, "e": [1]}, {"a": 2, "b": {"c": 7.0, "d": 3}}]
    assert median([*rounds, {"a": 9, "b": {"c": 6.0, "d": None}}]) == {
        "a": 2,
        "b": {"c": 6.0, "d": 3},
    }
    assert median([None]) is None


# The record.

NUMBER = {"type": ["number", "null"]}
SPREAD = {
    "type": "object",
    "properties": dict.fromkeys(("p50", "p99", "max"), NUMBER),
    "required": ["p50", "p99", "max"],
    "additionalProperties": False,
}
SPREADS = ("first_token_s", "per_token_s", "per_burst_s", "end_to_end_s")
COUNTS = ("requests", "errors", "seconds", "prompt_tokens", "tokens", "tokens_per_s")
COUNTS += ("requests_per_s", "tokens_per_burst", "rate", "latest_send_s")
COUNTS += ("client_cores", "server_cores")
FIGURES = {
    "type": "object",
    "properties": dict.fromkeys(SPREADS, SPREAD) | dict.fromkeys(COUNTS, NUMBER),
    "required": [*SPREADS, *COUNTS],
    "additionalProperties": False,
}
ROW = {
    "type": "object",
    "required": ["engine", "slots", "median", "rounds"],
    "properties": {"engine": {"type": "string"}, "slots": {"type": "integer", "minimum": 1}},
}
POINT_ROW = ROW | {
    "required": [*ROW["required"], "load", "kind", "amount", "ours_over_this"],
    "properties": ROW["properties"]
    | {
        "kind": {"enum": ["closed", "open", "share", "shared"]},
        "median": FIGURES,
        "rounds": {"type": "array", "items": FIGURES, "minItems": 1},
        "ours_over_this": NUMBER,
    },
}
BATCH_ROW = ROW | {"required": [*ROW["required"], "server_over_batch"]}
GAP_FIGURES = {
    "type": "object",
    "properties": dict.fromkeys(("idle_s", "during_s"), SPREAD)
    | dict.fromkeys(("p99_ratio", "max_ratio", "first_token_s", "streams"), NUMBER),
    "required": ["idle_s", "during_s", "p99_ratio", "max_ratio", "first_token_s", "streams"],
}
GAP_ROW = ROW | {"properties": ROW["properties"] | {"median": GAP_FIGURES}}
SCHEMA = {
    "type": "object",
    "required": ["model", "command", "date", "machine", "weights", "shape", "settings", "engines"],
    "properties": {
        "engines": {"additionalProperties": {"required": ["prompts", "batches"]}},
        "points": {"type": "array", "items": POINT_ROW},
        "batches": {"type": "array", "items": BATCH_ROW},
        "gaps": {"type": "array", "items": GAP_ROW},
        "failures": {"type": "array", "items": {"type": "string"}},
    },
}


def check_record(record):
    """A record has its form, and no path of a machine."""
    text = json.dumps(record)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert not re.search(r"""["'= ]/\w""", text)


ABOUT = {
    "model": "demo",
    "command": "python -m benchmarks.serve --shape=demo",
    "date": "2030-01-01T00:00:00+00:00",
    "machine": {"cpu": "a processor", "cores": 2},
    "weights": "random",
}


@pytest.fixture
def record(tmp_path):
    """A record of made-up rounds: ours with two slots and one, a peer that has one."""
    points = make_points([1, 4], ["50%"], 8, shared=True)
    load = Load(tuple(points), 16, 8, 2, 60.0, 0, True, 64)
    config = load_shape("demo")
    ours, one, peer = (
        Launch(name, "float16", config, None, tmp_path, slots, 24)
        for name, slots in (("ours", 2), ("ours", 1), ("llamacpp", 2))
    )
    bursts = [Burst(0.5, 4), Burst(0.75, 4)]
    answers = [Answer(0.0, 1.0, bursts, 16, 8, None)] * 7 + [Answer(0, 1, [], 0, 0, "late")]
    process = {"latest_send_s": 0.0, "client_cores": 0.1, "server_cores": 1.5}

    def figures(seconds, rate=None):
        return summarise(answers, seconds) | process | {"rate": rate}

    measured = Measured(failures=["ours:float16, 4 clients: 1 requests: late"])
    for point in points:
        rate = point.rate(2.0)
        measured.points[ours, point] = {0: figures(2.0, rate), 1: figures(4.0, rate)}
        measured.points[peer, point] = {0: figures(6.0, rate), 1: figures(16.0, rate)}
    measured.points[one, load.saturated] = {0: figures(5.0)}
    # The second round's alone is there: ratios are of rounds that both have.
    measured.batches[ours] = {1: {"requests": 8, "seconds": 2.0, "tokens": 56, "tokens_per_s": 28}}
    gap = compare([(0, 1), (1, 2), (2, 5)], 0, 6, [(2.5, 4)])
    measured.gaps[ours] = {turn: gap | {"streams": 1, "long_prompt": 64} for turn in range(2)}
    return make_record(config, load, measured, ABOUT)


def test_a_record_has_its_form(record):
    check_record(record)
    rows = {(row["engine"], row["slots"], row["load"]): row for row in record["points"]}
    saturated = rows["ours:float16", 2, "4 clients"]
    assert saturated["median"]["seconds"] == 3.0
    assert [figures["seconds"] for figures in saturated["rounds"]] == [2.0, 4.0]
    assert saturated["ours_over_this"] is None
    assert rows["llamacpp:float16", 1, "4 clients"]["ours_over_this"] == 3.5
    assert rows["ours:float16", 2, "50% of capacity"]["median"]["rate"] == 1.0
    assert ("ours:float16", 1, "4 clients") in rows
    (batch,) = record["batches"]
    assert batch["server_over_batch"] == pytest.approx(56 / 4 / 28)
    (gaps,) = record["gaps"]
    assert gaps["median"]["max_ratio"] == 3.0
    assert ["gaps" in figures for figures in gaps["rounds"]] == [True, False]


def test_a_report_has_every_figure(record):
    text = make_report(record)
    assert max(map(len, text.splitlines())) <= 115
    for part in ("50% of capacity", "3.50x", "50.0%", "of 64 tokens", "1 requests: late"):
        assert part in text
    assert "llamacpp:float16: prompts as text of as many tokens; one request at a time" in text
    assert make_report(record | {"points": [], "batches": [], "gaps": []})


def drawn(record):
    """Return each panel's first curve and its label below."""
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    from benchmarks.load.plot import draw_serving

    figure = draw_serving(record)
    figure.savefig(io.BytesIO())  # what cannot be laid out fails only here
    curves = [axes.get_lines()[0].get_xydata() for axes in figure.axes]
    return [dict(map(tuple, curve)) for curve in curves], [a.get_xlabel() for a in figure.axes]


def rates(rows, along):
    return {row[along]: row["median"]["tokens_per_s"] for row in rows}


def test_a_plot_is_drawn_along_the_clients(record):
    curves, labels = drawn(record)
    assert labels == ["clients", "clients", "s"]
    rows = [row for row in record["points"] if row["kind"] == "closed"]
    first = (rows[0]["engine"], rows[0]["slots"])
    assert curves[0] == rates([r for r in rows if (r["engine"], r["slots"]) == first], "amount")
    assert drawn(record | {"gaps": [], "batches": []})[1] == ["clients", "clients"]


def test_of_one_load_at_several_slots_a_plot_is_drawn_along_them(record):
    rows = [
        row
        for row in record["points"]
        if row["engine"] == "ours:float16" and row["load"] == "4 clients"
    ]
    curves, labels = drawn(record | {"points": rows, "gaps": []})
    assert labels == ["slots, of 4 clients"] * 2
    assert curves[0] == rates(rows, "slots")
    assert set(curves[0]) == {1, 2}


def test_an_error_shows_no_path():
    text = without_paths("status 400: no /home/me/a-model, see 'x/y' or /v1")
    assert text == "status 400: no ..., see 'x/y' or ..."


def test_the_same_body_goes_to_every_server(tmp_path):
    config = load_shape("demo")
    (prompt,) = Prompts(config.vocab_size).make(1, 16, 8)
    bodies = {}
    for name, server in PROGRAMS.items():
        launch = Launch(name, "float16", config, None, tmp_path, 2, 24, "llama-server")
        body = bodies[name] = server.request(launch, prompt)
        assert (body["max_tokens"], body["temperature"], body["stream"]) == (8, 0, True)
        assert all(isinstance(part, str) for part in server.command(launch, 1234))
    assert bodies["ours"]["prompt"] == bodies["llama-server"]["prompt"] == prompt.tokens
    assert Counter(map(len, (body["prompt"] for body in bodies.values()))) == {16: 4}


# The command.


@pytest.fixture
def cli(capsys):
    """Run main() on flags; return (exit status, stdout, stderr)."""

    def call(*arguments):
        saved = flagsaver.save_flag_values(program.FLAGS)
        try:
            with pytest.raises(SystemExit) as exit_:
                program.main(["benchmarks.serve", *arguments])
        finally:
            flagsaver.restore_flag_values(saved, program.FLAGS)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape=8b"], "--shape is '8b', expected one of"),
        (["--shape=1b", "--checkpoint=x"], "--shape is given with --checkpoint"),
        (["--checkpoint=none"], "--checkpoint=none has no config.json"),
        (["--dtype=int8"], "--dtype has the dtype 'int8'"),
        (["--slots=0"], "--slots is '0', expected whole numbers from 1 on"),
        (["--clients="], "--clients is '', expected whole numbers"),
        (["--rate=fast"], "--rate has 'fast', expected requests a second, or as 80%"),
        (["--rate=0"], "--rate has '0'"),
        (["--rounds=0", "--requests=0"], "--requests is 0, --rounds is 0, expected 1 or more"),
        (["--prompt_len=500"], "--prompt_len needs 564 positions, the shape has 512"),
        (["--gap=512"], "--gap needs 512 positions, the shape has 512"),
        (["--slots=1", "--gap=64"], "--gap needs --slots of 2 at least"),
        (["--context=100"], "--context is 100, expected 128 to 512"),
        (["--against=vllm"], "--against names 'vllm', expected llamacpp, llama-server, hf"),
        (["--name=a/b"], "--name is 'a/b', expected letters"),
        (["fast"], "got the argument 'fast', expected flags only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(cli, arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [] if {"--shape", "--checkpoint"} & {a.split("=")[0] for a in arguments} else ["demo"]
    status, out, err = cli(*arguments, *(f"--shape={name}" for name in small))
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_help_names_every_flag(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for flag in ("slots", "clients", "rate", "gap", "against", "requests"):
        assert f"--{flag}" in out or f"--[no]{flag}" in out


@pytest.mark.slow
def test_end_to_end(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.serve", "--shape=demo", "--slots=2"),
            *("--prompt_len=16", "--new_tokens=8", "--clients=1,4", "--rate=50%,20"),
            *("--requests=8", "--rounds=1", "--name=small", f"--output={tmp_path}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "small.json").read_text("utf-8"))
    check_record(record)
    assert record["failures"] == []
    assert [(row["slots"], row["load"]) for row in record["points"]] == [
        (2, "1 client"),
        (2, "4 clients"),
        (2, "50% of capacity"),
        (2, "20 requests/s"),
        (2, "4 clients, shared prefix"),
    ]
    for row in record["points"]:
        figures = row["median"]
        assert (figures["requests"], figures["errors"]) == (8, 0)
        assert (figures["prompt_tokens"], figures["tokens"]) == (8 * 16, 8 * 8)
    (batch,) = record["batches"]
    assert batch["median"]["tokens"] == 64
    assert batch["server_over_batch"] > 0
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_waits_beside_a_long_prompt_end_to_end(tmp_path):
    launch = Launch("ours", "float16", load_shape("demo"), None, tmp_path, 2, 512)
    program.write_files([launch], tmp_path)
    with (tmp_path / "log").open("wb") as log, running(launch, log) as server:
        figures = {}
        for _ in range(20):  # the demo's streams last 0.1 s: they may end before we get to look
            with contextlib.suppress(EngineError):
                figures = measure_gap(server, 100, timeout_s=60)
                break
    assert figures["max_ratio"] > 0
    assert (figures["streams"], len(figures["admissions"])) == (1, 3)
