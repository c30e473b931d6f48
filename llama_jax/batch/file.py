"""Batch: a file of requests to a file of results, line by line; resumed where it stopped."""

import collections
import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.batch.line import Format, Line, head, parse, request_format, take_id
from llama_jax.engine.stream import Stream, finish_in_order
from llama_jax.errors import InputError
from llama_jax.llama import Llama
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
        source: JSON lines; empty ones are skipped.
        output: created, or, if it exists, continued.
        format_of: returns the format of a line's fields; the default tells the two above apart.

    Raises:
        InputError: a file cannot be read or written, another `Batch` has the output, or it
            holds the results of another input.
    """

    def __init__(
        self,
        source: str | pathlib.Path,
        output: str | pathlib.Path,
        format_of: Callable[[Any], Format] = request_format,
    ):
        self._format_of = format_of
        self.source, self.output = pathlib.Path(source), pathlib.Path(output)
        self.failed = 0
        """Lines with an error, those of earlier runs included."""
        self.ignored = collections.Counter[str]()
        """In how many lines a field was ignored, by its name; those of earlier runs included."""
        try:
            self.source, self.output = self.source.expanduser(), self.output.expanduser()
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
        except RuntimeError as error:  # `~nobody`
            raise InputError(f"{source}, {output}: {error}; name another file") from None

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
        for line, stream in finish_in_order(llm.engine, self._submissions(llm)):
            if stream is not None:
                collections.deque(stream, maxlen=0)
                line.results.append(stream.result)
            line.waiting -= 1
            if not line.waiting:
                self._write(line.output())
                yield

    def _submissions(self, llm: Llama) -> Iterator[Callable[[], tuple[Line, Stream | None]]]:
        """Yield what submits each generation of the lines that are left."""
        done, ids = self.done, dict[str | int, int]()
        for index, (number, text) in enumerate(self._lines()):
            if index < done:
                with contextlib.suppress(InputError):
                    take_id(parse(text), ids, number)
                continue
            line = Line(number, text, ids, llm, self._format_of)
            for i in range(line.waiting):
                yield functools.partial(line.submit, i, llm)

    def _write(self, row: dict[str, Any]) -> None:
        # A field's name may have a lone surrogate, which UTF-8 cannot encode.
        text = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._file.write(text + b"\n")
        self._file.flush()
        self._count(row)
        self.done += 1

    def _count(self, row: dict[str, Any]) -> None:
        self.failed += row.get("error") is not None
        # One name for messages[0].name and messages[1].name, and each once a line.
        self.ignored.update({re.sub(r"\[\d+\]", "[]", name) for name in row.get("ignored", ())})

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
            expected = json.dumps(head(number, line)).encode().removesuffix(b"}")
            if text[: len(expected)] != expected[: len(text)]:
                raise InputError(
                    f"{self.output}, line {done + 1}, is not a result of {self.source}, line "
                    f"{number}: the input has changed, or the results are another's; name a new "
                    "file"
                )
            if text.endswith(b"\n"):
                self._count(parse_json(text, f"{self.output}, line {done + 1}"))
                done, size = done + 1, size + len(text)
        self._file.truncate(size)
        return done
