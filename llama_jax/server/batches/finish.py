"""Finish: how a batch ends. Its answers become files, and what is left is removed."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.server.batches.batch_store import OPENAI, BatchStore
from llama_jax.server.batches.file_store import FileStore
from llama_jax.server.batches.forms import line_of
from llama_jax.server.batches.line_store import Answer, LineStore
from llama_jax.server.batches.settings import BatchSettings
from llama_jax.server.compact_json import encode

_EXPIRED = (
    "batch_expired",
    "This request could not be executed before the completion window expired.",
)
_END = {"finalizing": "completed", "cancelling": "cancelled", "expiring": "expired"}


class Finish:
    """Ends batches whose lines are done, or whose time is up. May be repeated at any point.

    Args:
        files, batches, lines: where they are.
        settings: how long files are kept.
        llm: the model.
    """

    def __init__(
        self,
        files: FileStore,
        batches: BatchStore,
        lines: LineStore,
        settings: BatchSettings,
        llm: Llama,
    ):
        self._files, self._batches, self._lines = files, batches, lines
        self._settings, self._llm = settings, llm

    def end(self, batch: dict[str, Any]) -> None:
        """End a batch that is finalizing, cancelling or expiring.

        Raises:
            OSError: its answers cannot be written, such as on a full disk.
            sqlite3.Error: likewise.
        """
        number = batch["number"]
        if batch["status"] == "expiring":
            self._expire(batch)
        if batch["kind"] != OPENAI:
            self._batches.change(number, _END[batch["status"]])
            self._files.remove(batch["input_file_id"])
            return
        files = {}
        for name, ok in (("output_file_id", True), ("error_file_id", False)):
            if self._lines.has_answers(number, ok):
                files[name] = self._write(batch, name, ok)
        # First the end, then the removal: whoever is killed between them keeps both.
        self._batches.change(number, _END[batch["status"]], **files)
        self._lines.clear(number)

    def fail(self, batch: dict[str, Any], problems: list[dict[str, Any]]) -> None:
        """End a batch whose input is wrong."""
        errors = {"object": "list", "data": problems}
        self._batches.change(batch["number"], "failed", errors=encode(errors).decode())
        self._lines.clear(batch["number"])

    def sweep(self) -> None:
        """Begin to end what has expired, forget what was kept for long enough, free the disk."""
        self._batches.expire()
        removed = self._files.sweep()
        for batch in self._batches.forgotten():
            self._batches.remove(batch["number"])
            removed += 1
        if removed:
            self._files.folder.database.shrink()

    def _expire(self, batch: dict[str, Any]) -> None:
        """Answer the lines that are left by an error."""
        for line in self._lines.left(batch["number"]):
            form = line_of(batch, line)
            if batch["kind"] != OPENAI:  # for the client's own name of the request
                with contextlib.suppress(InputError, OSError):
                    form.read(self._files.read_line(batch, line), self._llm, [batch["model"]])
            row = form.unanswered(*_EXPIRED)
            self._lines.finish(batch["number"], line["number"], Answer(False, encode(row)))

    def _write(self, batch: dict[str, Any], name: str, ok: bool) -> str:
        """Write the file of a batch's answers, or of its errors; return its id."""
        digest = hashlib.sha256(f"{batch['id']} {name}".encode()).hexdigest()
        file_id = f"file-{digest[:32]}"

        def rows() -> Iterator[bytes]:
            for answer in self._lines.answers(batch["number"], ok):
                yield answer["text"] + b"\n"

        size = self._files.folder.write(file_id, rows())
        keep_s = min(batch["output_expires_s"] or math.inf, self._settings.keep_s)
        filename = f"{batch['id']}_{'output' if ok else 'error'}.jsonl"
        self._files.enter(file_id, size, "batch_output", filename, keep_s)
        return file_id
