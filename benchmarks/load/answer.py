"""An answer, read from its recording once the load is over."""

import bisect
import dataclasses
import http.client
import io
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any, cast

from benchmarks.load.client import BURST_S, Recording


@dataclasses.dataclass(frozen=True)
class Burst:
    """Text that arrived together."""

    time: float
    """Of its first byte, by `time.perf_counter`."""
    tokens: float
    """The answer's tokens, shared out by characters: exact where each is one (`vocabulary.py`)."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request got."""

    began: float
    ended: float
    bursts: list[Burst]
    prompt_tokens: int | None
    """As the server counted; None: it did not say."""
    tokens: int
    """As the server counted; where it does not say, the characters."""
    error: str | None
    """Why it does not count; then the rest need not be there."""

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to its first text; None: it has none."""
        return self.bursts[0].time - self.began if self.bursts else None

    @property
    def gaps(self) -> list[tuple[float, Burst]]:
        """The seconds between bursts, each with the burst that it was waited for."""
        return [(later.time - b.time, later) for b, later in itertools.pairwise(self.bursts)]


class _Recorded:
    """All that `http.client` asks of a socket."""

    def __init__(self, data: bytes):
        self.file = io.BufferedReader(io.BytesIO(data))

    def makefile(self, *_: Any, **__: Any) -> Any:
        return self.file


def read_answer(recording: Recording) -> Answer:
    """Read an answer, and say what is wrong with it if anything is."""
    texts: list[tuple[float, int]] = []
    usage: dict[str, int] = {}
    finished, error = False, recording.problem
    try:
        for time, event in _events(recording):
            problem = event.get("error") or event.get("errors")
            error = error or (problem and f"told in the stream: {str(problem)[:200]}")
            said = event.get("usage") or {}  # in more than one event, and perhaps of zeros
            usage = max(usage, said, key=lambda counts: counts.get("completion_tokens", 0))
            for choice in event.get("choices", []):
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                finished = finished or choice.get("finish_reason") is not None
                if text:
                    texts.append((time, len(text)))
    except (http.client.HTTPException, OSError, ValueError) as problem:
        error = error or f"{type(problem).__name__}: {problem}"
    if error is None and not finished:
        error = "cut off: the stream has no finish_reason"
    characters = sum(count for _, count in texts)
    tokens = usage.get("completion_tokens", characters)
    ended = recording.arrivals[-1][0] if recording.arrivals else recording.began
    bursts = list(_bursts(texts, tokens / characters)) if characters else []
    return Answer(recording.began, ended, bursts, usage.get("prompt_tokens"), tokens, error)


def _events(recording: Recording) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield each event of the stream with the time at which its last byte came.

    Raises:
        http.client.HTTPException, ValueError: it is no stream of events, or no whole one.
    """
    ends = list(itertools.accumulate(len(data) for _, data in recording.arrivals))
    recorded = _Recorded(b"".join(data for _, data in recording.arrivals))
    response = http.client.HTTPResponse(cast(socket.socket, recorded))
    response.begin()
    if response.status != 200:
        raise ValueError(
            f"status {response.status}: {response.read()[:200].decode(errors='replace')}"
        )
    file = recorded.file  # the response lets go of it at its end
    while line := response.readline():
        place = file.tell() if not file.closed else ends[-1]
        if line.startswith(b"data:") and line.strip() != b"data: [DONE]":
            time, _ = recording.arrivals[bisect.bisect_left(ends, place)]
            yield time, json.loads(line.removeprefix(b"data:"))


def _bursts(texts: list[tuple[float, int]], tokens_per_character: float) -> Iterator[Burst]:
    """Join what arrived together."""
    begin, last, count = texts[0][0], texts[0][0], 0
    for time, characters in texts:
        if time - last > BURST_S:
            yield Burst(begin, count * tokens_per_character)
            begin, count = time, 0
        last, count = time, count + characters
    yield Burst(begin, count * tokens_per_character)
