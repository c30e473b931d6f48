"""Batch: a file of requests to a file of results, line by line; resumed where it stopped."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from llama_jax.card import contract
from llama_jax.engine.stream import Stream, finish_in_order
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.strict_json import parse_json


class Batch:
    """A file of requests and the file of their results; a context manager that closes the latter.

    Each line of the input is a request in the model card's format. For each there is a line of
    output: `line`, its number from 1, its `sha256`, `ignored`, the fields without effect (those
    that the card does not have, and `stream`), and its `result` or its `error`.

    No other `Batch` can have the same output until this one is closed or its process ends.

    Args:
        source: JSON lines; empty ones are skipped.
        output: created, or, if it exists, continued.

    Raises:
        InputError: a file cannot be read or written, another `Batch` has the output, or it
            holds the results of another input.
    """

    def __init__(self, source: str | pathlib.Path, output: str | pathlib.Path):
        self.source, self.output = pathlib.Path(source), pathlib.Path(output)
        self.failed = 0
        """Lines with an error, those of earlier runs included."""
        try:
            self.total = sum(1 for _ in self._lines())
            self._file = self.output.open("a+b")  # whatever it holds stays
            try:
                self._lock()
                if self.output.samefile(self.source):
                    raise InputError(f"{self.output} is both input and output; name a new file")
                self.done = self._resume()
            except BaseException:  # an interrupt too: the lock must not stay
                self.close()
                raise
        except OSError as error:
            name, reason = error.filename or self.output, error.strerror or error
            raise InputError(f"{name}: {reason}; name another file") from None

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the output."""
        self._file.close()

    def run(self, llm: Llama) -> Iterator[None]:
        """Generate what is left, as many at once as there are slots; yield after each line.

        Lines are written whole and in order.
        """
        lines = itertools.islice(self._lines(), self.done, None)
        submissions = (functools.partial(_start, llm, *each) for each in lines)
        for row, stream in finish_in_order(llm.engine, submissions):
            if stream is not None:
                collections.deque(stream, maxlen=0)
                row["result"] = dataclasses.asdict(stream.result)
            self.failed += "error" in row
            # A field's name may have a lone surrogate, which UTF-8 cannot encode.
            text = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._file.write(text + b"\n")
            self._file.flush()
            self.done += 1
            yield

    def _lock(self) -> None:
        """Lock the output until it is closed, or the process ends."""
        try:
            import fcntl
        except ImportError:  # Windows: two writers of one file are not detected
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.output} is in use by another run, expected one at a time; wait for it, or "
                "name another file"
            ) from None

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line

    def _resume(self) -> int:
        """Return how many lines are done; cut off a last one that is not whole."""
        done, size = 0, 0
        requests = self._lines()
        self._file.seek(0)
        for text in self._file:
            number, line = next(requests, (0, b""))
            if not number:
                raise InputError(
                    f"{self.output} has more lines than {self.source} has requests; name a new file"
                )
            expected = json.dumps(_head(number, line)).encode().removesuffix(b"}")
            if text[: len(expected)] != expected[: len(text)]:
                raise InputError(
                    f"{self.output}, line {done + 1}, is not a result of {self.source}, line "
                    f"{number}: the input has changed, or the results are another's; name a new "
                    "file"
                )
            if text.endswith(b"\n"):
                self.failed += "error" in parse_json(text, f"{self.output}, line {done + 1}")
                done, size = done + 1, size + len(text)
        self._file.truncate(size)
        return done


def _head(number: int, line: bytes) -> dict[str, Any]:
    """Return what a line of output begins with: which request it answers."""
    return {"line": number, "sha256": hashlib.sha256(line.strip()).hexdigest()}


def _start(llm: Llama, number: int, line: bytes) -> tuple[dict[str, Any], Stream | None]:
    """Submit a line's request; return the row for its result, or with its error."""
    row = _head(number, line)
    try:
        card = contract.check(contract.parse_body(line, "the request"))
        row["ignored"] = card.ignored + ["stream"] * card.stream
        return row, llm.start(card.request())
    except InputError as error:
        row["error"] = str(error)
        return row, None
