"""Batch: a file of requests to a file of results, line by line; resumed where it stopped."""

import collections
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from io import FileIO
from typing import Any

from llama_jax.batch.line import (
    Format,
    Line,
    answer_lines,
    encode_row,
    head,
    parse,
    request_format,
    take_id,
)
from llama_jax.batch.requests import Requests
from llama_jax.engine.line_seeds import check_job_seed
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.receipt.file import ReceiptFile
from llama_jax.regular_file import check_regular, open_regular
from llama_jax.strict_json import parse_json


class Batch:
    """A file of requests and the file of their results; a context manager that closes the latter.

    Each line of the input is a request in the model card's format, or in that of OpenAI's batches.
    For each there is a line of output: `line`, its number from 1, its `sha256`, its `custom_id` and
    `metadata` if it has them, `ignored`, the fields without effect, and its `result` or its
    `error`. For a request in OpenAI's format it has the fields of OpenAI's output in place of the
    last three; see `server.openai.batch`.

    No other `Batch` can have the same output until this one is closed or its process ends.

    Args:
        source: JSON lines; empty ones are skipped. A pipe is read to its end first.
        output: a file; created, or, if it exists, continued.
        format_of: returns the format of a line's fields; the default tells the two above apart.
        receipts: where a line's receipts go, before its result; continued with the output.
        seed: from 0 to 2^64 - 1; a line without a seed gets one that follows from this one, its
            number and its bytes, so another run answers it alike.

    Raises:
        InputError: the seed is out of range, a file cannot be read or written, another `Batch` has
            the output, or it holds the results of another input.
    """

    def __init__(
        self,
        source: str | pathlib.Path,
        output: str | pathlib.Path,
        format_of: Callable[[Any], Format] = request_format,
        *,
        receipts: ReceiptFile | None = None,
        seed: int = 0,
    ):
        self.seed = check_job_seed(seed)
        """From which lines without a seed get theirs."""
        self._format_of, self._receipts = format_of, receipts
        self._file: FileIO | None = None
        self.source, self.output = pathlib.Path(source), pathlib.Path(output)
        self.failed = 0
        """Lines with an error, those of earlier runs included."""
        self.ignored = collections.Counter[str]()
        """In how many lines a field was ignored, by its name; those of earlier runs included."""
        try:
            self.source, self.output = self.source.expanduser(), self.output.expanduser()
            with contextlib.suppress(FileNotFoundError):
                check_regular(self.output)  # results are read again, resumed and locked
            self._requests = Requests(self.source)
            self.total = self._requests.total
            try:
                self._file = self.output.open("ab", buffering=0)  # whatever it holds stays
                self._begin()
            except BaseException:  # an interrupt too: the lock must not stay
                self.close()
                raise
        except OSError as error:
            name, reason = error.filename or self.output, error.strerror or error
            raise InputError(f"{name}: {reason}; name another file") from None
        except RuntimeError as error:  # `~nobody`
            raise InputError(f"{source}, {output}: {error}; name another file") from None

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release both files."""
        self._requests.close()
        if self._file is not None:
            self._file.close()

    def run(self, llm: Llama) -> Iterator[None]:
        """Generate what is left, as many at once as there are slots; yield after each line.

        Lines are written whole and in order.

        Raises:
            InputError: the output cannot be written, such as on a full disk; the lines before are.
        """
        for line in answer_lines(self._lines(llm), llm):
            if self._receipts is not None:
                self._receipts.append_row(line.head, line.results)
            self.write(line.output())
            yield

    def pending(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield each line that is left: its number, its text, and the first line that has its
        `custom_id`; 0: it has none, or one that is refused for itself."""
        done, ids = self.done, dict[str | int, int]()
        for index, (number, text) in enumerate(self._requests):
            first = 0
            with contextlib.suppress(InputError):
                fields = parse(text)
                name = fields.get("custom_id") if isinstance(fields, dict) else None
                if isinstance(name, str | int) and not isinstance(name, bool):
                    first = ids.setdefault(name, number)
            if index >= done:
                yield number, text, first

    def write(self, row: dict[str, Any]) -> None:
        """Append the line of output of the first line that is left.

        Raises:
            InputError: see `run`.
        """
        self._append(encode_row(row) + b"\n")
        self._count(row)
        self.done += 1

    def _lines(self, llm: Llama) -> Iterator[Line]:
        done, ids = self.done, dict[str | int, int]()
        for index, (number, text) in enumerate(self._requests):
            if index < done:
                with contextlib.suppress(InputError):
                    take_id(parse(text), ids, number)
                continue
            yield Line(number, text, ids, llm, self._format_of, self.seed)

    def _count(self, row: dict[str, Any]) -> None:
        self.failed += row.get("error") is not None
        # One name for messages[0].name and messages[1].name, and each once a line.
        names = row.get("ignored", ())
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{self.output}: ignored is {names!r:.40}, expected names; name a new file"
            )
        self.ignored.update({re.sub(r"\[\d+\]", "[]", name) for name in names})

    def _append(self, text: bytes) -> None:
        """Write a line; if there is no room for it, leave nothing of it."""
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        try:
            while text:
                text = text[self._file.write(text) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next run does
                self._file.truncate(size)
            raise InputError(
                f"{self.output} cannot be written ({error.strerror}) after {self.done:,} of "
                f"{self.total:,} results; make room and run the same again: it continues there"
            ) from None

    def _begin(self) -> None:
        """Lock the output and find out what it holds."""
        self._lock()
        assert self._file is not None
        if self._requests.is_file(os.fstat(self._file.fileno())):
            raise InputError(f"{self.output} is both input and output; name a new file")
        self.done = self._resume()
        if self._receipts is not None:
            self._receipts.resume(self.done)

    def _lock(self) -> None:
        """Lock the output until it is closed, or the process ends."""
        try:
            import fcntl
        except ImportError:  # Windows: two writers of one file are not detected
            return
        try:
            assert self._file is not None
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.output} is in use by another run, expected one at a time; wait for it, or "
                "name another file"
            ) from None

    def _resume(self) -> int:
        """Return how many lines are done; cut off a last one that is not whole."""
        done, size = 0, 0
        requests = iter(self._requests)
        with open_regular(self.output) as results:
            for text in results:
                self._check_result(next(requests, None), text, done + 1)
                if text.endswith(b"\n"):
                    self._count(parse_json(text, f"{self.output}, line {done + 1}"))
                    done, size = done + 1, size + len(text)
        assert self._file is not None
        self._file.truncate(size)
        return done

    def _check_result(self, request: tuple[int, bytes] | None, text: bytes, place: int) -> None:
        """Refuse a line of the output that does not answer the request of its place."""
        if request is None:
            raise InputError(
                f"{self.output} has more lines than {self.source} has requests; name a new file"
            )
        expected = json.dumps(head(*request)).encode().removesuffix(b"}")
        if text[: len(expected)] != expected[: len(text)]:
            raise InputError(
                f"{self.output}, line {place}, is not a result of {self.source}, line "
                f"{request[0]}: the input has changed, or the results are another's; name a new "
                "file"
            )
