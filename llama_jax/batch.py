"""Batch: a file of requests to a file of results, line by line, taken up again where it stopped."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from llama_jax import contract
from llama_jax.errors import InputError
from llama_jax.files import parse_json
from llama_jax.llama import Llama
from llama_jax.stream import Stream


class Batch:
    """A file of requests, and the file that its results go to.

    Each line of the input is a request in the model card's form. For each there is a line of
    output: `line`, its number from 1, its `sha256`, `ignored`, the fields that the card does not
    have, and its `result` or its `error`.

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
            self.done = self._take_up()
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; name another file") from None

    def run(self, llm: Llama) -> Iterator[None]:
        """Generate what is left, as many at once as there are slots; yield after each line.

        A line is written, whole, as soon as those before it are.
        """
        waiting: collections.deque[tuple[dict[str, Any], Stream | None]] = collections.deque()
        with self.output.open("ab") as output:
            for number, line in itertools.islice(self._lines(), self.done, None):
                row = {"line": number, "sha256": _digest(line)}
                waiting.append((row, _start(llm, line, row)))
                if len(waiting) == 2 * llm.executor.batch:  # some in the queue: no slot falls idle
                    yield self._write(output, *waiting.popleft())
            while waiting:
                yield self._write(output, *waiting.popleft())

    def _write(self, output: BinaryIO, row: dict[str, Any], answer: Stream | None) -> None:
        if answer is not None:
            collections.deque(answer, maxlen=0)
            row["result"] = dataclasses.asdict(answer.result)
        self.failed += "error" in row
        output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        output.flush()
        self.done += 1

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
                if not text.endswith(b"\n"):
                    break
                number, line = next(requests, (0, b""))
                if not number:
                    raise InputError(
                        f"{self.output} has more lines than {self.source} has requests; "
                        "name a new file"
                    )
                row = parse_json(text, f"{self.output}, line {whole + 1}")
                if not isinstance(row, dict) or row.get("sha256") != _digest(line):
                    raise InputError(
                        f"{self.output}, line {whole + 1}, is no result of {self.source}, line "
                        f"{number}: that has changed, or the results are another's; name a new file"
                    )
                self.failed += "error" in row
                whole, size = whole + 1, size + len(text)
            output.truncate(size)
        return whole


def _start(llm: Llama, line: bytes, row: dict[str, Any]) -> Stream | None:
    """Submit a line's request; note in its row what is wrong with it, or left out of account."""
    try:
        card = contract.check(contract.parse_body(line, "the request"))
        row["ignored"] = card.ignored
        return llm.start(card.request())
    except InputError as error:
        row["error"] = str(error)
        return None


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()
