"""Validation: whether a file is a batch's input, line by line, before any line is answered."""

import hashlib
from collections.abc import Iterator
from typing import Any

from llama_jax.card import contract
from llama_jax.errors import InputError
from llama_jax.server.batches.batch_store import OPENAI
from llama_jax.server.batches.folder import Folder
from llama_jax.server.batches.line_store import LineStore, NewLine

MAX_PROBLEMS = 100
"""That are reported of one file."""

_SLICE = 64
"""Lines that are checked without a pause."""


class Validation:
    """The check of one batch's input, a slice at a time; lines are entered as they are read.

    A line's request is not checked: what is wrong with that is the line's error.

    Args:
        batch: its row.
        folder: holds the input.
        lines: where the lines are entered, those of an earlier try first removed.
        max_requests: lines that a batch may have.
        max_line_bytes: bytes that a line may have.
    """

    def __init__(
        self,
        batch: dict[str, Any],
        folder: Folder,
        lines: LineStore,
        *,
        max_requests: int,
        max_line_bytes: int,
    ):
        self._batch, self._folder, self._lines = batch, folder, lines
        self._max_requests, self._max_line_bytes = max_requests, max_line_bytes
        self._ids: dict[str, int] = {}
        self.total = 0
        """Lines so far."""
        self.problems: list[dict[str, Any]] = []
        """Each as OpenAI's batches report it."""

    def slices(self) -> Iterator[None]:
        """Check the file; yield after each slice."""
        self._lines.clear(self._batch["number"])
        try:
            yield from self._read()
        except OSError as error:
            self._add(
                None, "unreadable_file", f"The file cannot be read: {error.strerror or error}"
            )
        if not self.total and not self.problems:
            self._add(None, "empty_file", "The file has no requests, expected a JSON line each")

    def _read(self) -> Iterator[None]:
        new: list[NewLine] = []
        for number, start, text in self._folder.lines(
            self._batch["input_file_id"], self._max_line_bytes
        ):
            self.total += 1
            if self.total > self._max_requests:
                most = f"{self._max_requests:,}"
                self._add(number, "too_many_requests", f"The file has more than {most} requests")
                return
            digest = hashlib.sha256(text.strip()).hexdigest()
            new.append(NewLine(number, start, len(text), digest, self._check(number, text)))
            if len(self.problems) >= MAX_PROBLEMS:
                return
            if len(new) == _SLICE:
                self._lines.add(self._batch["number"], new)
                new = []
                yield
        self._lines.add(self._batch["number"], new)

    def _check(self, number: int, text: bytes) -> str | None:
        """Return a line's custom_id, if it has a right one."""
        if len(text) > self._max_line_bytes:
            most = f"{self._max_line_bytes:,}"
            self._add(number, "line_too_long", f"The line has more than {most} bytes")
            return None
        if self._batch["kind"] != OPENAI:
            return None
        try:
            fields = contract.parse_body(text, "the line")
        except InputError as error:
            self._add(number, "invalid_json_line", str(error))
            return None
        if not isinstance(fields, dict):
            self._add(
                number, "invalid_json_line", f"The line is {fields!r:.40}, expected an object"
            )
            return None
        self._expect(number, "method", fields.get("method"), "POST", "invalid_method")
        self._expect(number, "url", fields.get("url"), self._batch["endpoint"], "mismatched_url")
        if not isinstance(fields.get("body"), dict):
            text_ = f"body is {fields.get('body')!r:.40}, expected an object: the request"
            self._add(number, "missing_body", text_, "body")
        return self._custom_id(number, fields.get("custom_id"))

    def _custom_id(self, number: int, custom_id: Any) -> str | None:
        if not isinstance(custom_id, str) or not custom_id:
            text = f"custom_id is {custom_id!r:.40}, expected a string that names this request"
            self._add(number, "missing_custom_id", text, "custom_id")
            return None
        first = self._ids.setdefault(custom_id, number)
        if first != number:
            text = f"custom_id is {custom_id!r:.60}, which line {first} has too, expected its own"
            self._add(number, "duplicate_custom_id", text, "custom_id")
        return custom_id

    def _expect(self, number: int, name: str, value: Any, expected: str, code: str) -> None:
        if value != expected:
            self._add(number, code, f"{name} is {value!r:.60}, expected {expected!r}", name)

    def _add(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        problem = {"code": code, "line": line, "message": message, "param": param}
        self.problems.append(problem)
