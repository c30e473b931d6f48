"""Batch: a file of requests to a file of results, line by line, taken up again where it stopped."""

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
    """A file of requests, and the file that its results go to.

    Each line of the input is a request in the model card's form. For each there is a line of
    output: `line`, its number from 1, its `sha256`, `ignored`, the fields that change nothing
    (those that the card does not have, and `stream`), and its `result` or its `error`.

    Args:
        source: JSON lines; empty ones are passed over.
        output: is made, or, if it is there, taken up again.

    Raises:
        InputError: a file cannot be read or written, or the output is of another input.
    """

    def __init__(self, source: str | pathlib.Path, output: str | pathlib.Path):
        self.source, self.output = pathlib.Path(source), pathlib.Path(output)
        self.failed = 0
        """Lines that got an error, in earlier runs too."""
        try:
            self.total = sum(1 for _ in self._lines())
            self.output.touch()
            if self.output.samefile(self.source):
                raise InputError(f"{self.output} is both input and output; name a new file")
            self.done = self._take_up()
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; name another file") from None

    def run(self, llm: Llama) -> Iterator[None]:
        """Generate what is left, as many at once as there are slots; yield after each line.

        A line is written, whole, as soon as those before it are.
        """
        lines = itertools.islice(self._lines(), self.done, None)
        with self.output.open("ab") as output:
            submissions = (functools.partial(_start, llm, *each) for each in lines)
            for row, stream in finish_in_order(llm.engine, submissions):
                if stream is not None:
                    collections.deque(stream, maxlen=0)
                    row["result"] = dataclasses.asdict(stream.result)
                self.failed += "error" in row
                # A field may be named by half a character.
                text = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
                output.write(text + b"\n")
                output.flush()
                self.done += 1
                yield

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line

    def _take_up(self) -> int:
        """Return how many lines are done; cut off one that was not written to its end."""
        whole, size = 0, 0
        requests = self._lines()
        with self.output.open("r+b") as output:
            for text in output:
                number, line = next(requests, (0, b""))
                if not number:
                    raise InputError(
                        f"{self.output} has more lines than {self.source} has requests; "
                        "name a new file"
                    )
                begins = json.dumps(_head(number, line)).encode().removesuffix(b"}")
                if text[: len(begins)] != begins[: len(text)]:
                    raise InputError(
                        f"{self.output}, line {whole + 1}, is no result of {self.source}, line "
                        f"{number}: that has changed, or the results are another's; name a new file"
                    )
                if text.endswith(b"\n"):
                    self.failed += "error" in parse_json(text, f"{self.output}, line {whole + 1}")
                    whole, size = whole + 1, size + len(text)
            output.truncate(size)
        return whole


def _head(number: int, line: bytes) -> dict[str, Any]:
    """Return what a line of output begins with: whose it is."""
    return {"line": number, "sha256": hashlib.sha256(line.strip()).hexdigest()}


def _start(llm: Llama, number: int, line: bytes) -> tuple[dict[str, Any], Stream | None]:
    """Submit a line's request; say in its row what is wrong with it, or left out of account."""
    row = _head(number, line)
    try:
        card = contract.check(contract.parse_body(line, "the request"))
        row["ignored"] = card.ignored + ["stream"] * card.stream
        return row, llm.start(card.request())
    except InputError as error:
        row["error"] = str(error)
        return row, None
