"""What a generation gives: pieces of text, then a Result with its timings."""

import dataclasses
import time
from collections.abc import Generator, Iterator
from typing import Any, Literal

from llama_jax.executor import Executor


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished generation; its fields are those of the command line's JSON."""

    response: str | None
    """The text; None if the checkpoint has no tokenizer."""
    tokens: list[int]
    """Ids generated; the EOS that ended them is left out."""
    prompt_tokens: list[int]
    """Ids the model was fed."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model drew EOS; `length`: max_tokens were drawn."""
    usage: dict[str, int]
    """prompt_tokens, completion_tokens (without EOS) and total_tokens, counted."""
    seed: int
    parameters: dict[str, Any]
    """The effective parameters, defaults and drawn seed included."""
    timings: dict[str, float | None]
    """Seconds: load_s, compile_s, prefill_s (to the first token), decode_s; tokens per second:
    prefill_tokens_per_s, decode_tokens_per_s (None if nothing was decoded)."""


class Stream:
    """Pieces of text as they are drawn; `result` is there once the last has been taken."""

    def __init__(self, pieces: Generator[str, None, Result]):
        self._pieces = pieces
        self._result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as stop:
            self._result = self._result or stop.value
            raise

    @property
    def result(self) -> Result:
        """The whole result, equal to that of `generate`."""
        if self._result is None:
            raise RuntimeError("the stream has not been read to its end yet")
        return self._result


class Stopwatch:
    """Time a generation from inside: without compilation, and without what its reader does."""

    def __init__(self, executor: Executor):
        self._log = executor.compiled
        self._compile_before = executor.compiled.seconds
        self._first_s = self._rest_s = 0.0
        self._count = 0

    def time(self, draws: Iterator[int]) -> Iterator[int]:
        """Pass the tokens on, noting how long each took to come."""
        while True:
            began, compiled = time.perf_counter(), self._log.seconds
            token = next(draws, None)
            spent = time.perf_counter() - began - (self._log.seconds - compiled)
            if self._count == 0:
                self._first_s = spent
            else:
                self._rest_s += spent
            if token is None:
                return
            self._count += 1
            yield token

    def timings(self, prompt_length: int) -> dict[str, float | None]:
        """Return the fields of `Result.timings` but load_s."""
        decoded = self._count - 1
        return {
            "compile_s": self._log.seconds - self._compile_before,
            "prefill_s": self._first_s,
            "decode_s": self._rest_s,
            "prefill_tokens_per_s": prompt_length / self._first_s if self._count else None,
            "decode_tokens_per_s": decoded / self._rest_s if decoded > 0 else None,
        }
