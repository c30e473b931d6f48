"""ReceiptFile: receipts that are appended to a file, each on a line."""

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from llama_jax.engine.result import Result
from llama_jax.errors import InputError
from llama_jax.provenance.statement import make_statement
from llama_jax.receipt.envelope import parse_envelope
from llama_jax.receipt.keys import Signer
from llama_jax.regular_file import check_regular
from llama_jax.strict_json import parse_json


class ReceiptFile:
    """A file of receipts; what it holds stays. A context manager that closes it.

    Args:
        path: created, or appended to.
        private: see `Result.receipt`.
        signer: puts each receipt into an envelope; None: they are not signed.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        private: bool = False,
        signer: Signer | None = None,
    ):
        self.path, self._private, self._signer = pathlib.Path(path), private, signer
        try:
            with contextlib.suppress(FileNotFoundError):
                check_regular(self.path)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; name another file") from None

    def __enter__(self) -> "ReceiptFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def append(self, result: Result) -> None:
        """Write a result's receipt.

        Raises:
            InputError: there is no room for it; nothing of it is left.
        """
        self._write(self._receipt(result))

    def append_row(self, head: dict[str, Any], results: Sequence[Result]) -> None:
        """Write the receipts of a batch's line, none if it failed, after what names the line.

        Raises:
            InputError: see `append`.
        """
        self._write(head | {"receipts": [self._receipt(result) for result in results]})

    def resume(self, count: int) -> None:
        """Keep the first lines, which a batch has results for.

        Raises:
            InputError: there are fewer, or a receipt there is signed otherwise than those to come.
        """
        self._file.seek(0)
        size = 0
        for number in range(count):
            if not (line := self._file.readline()).endswith(b"\n"):
                raise InputError(
                    f"{self.path} has {number:,} receipts, but the output has {count:,} results; "
                    "name the file of these results, or a new output and a new file of receipts"
                )
            self._check_signer(line, f"{self.path}, line {number + 1}")
            size += len(line)
        self._file.truncate(size)

    def _check_signer(self, line: bytes, source: str) -> None:
        """Refuse a line whose receipts another key signed, or none: one key verifies a file."""
        row = parse_json(line, source)
        receipts = row.get("receipts") if isinstance(row, dict) else None
        if not isinstance(receipts, list):
            raise InputError(f"{source} is no line of a batch's receipts; name another file")
        ours = [] if self._signer is None else [self._signer.key_id]
        for receipt in receipts:
            envelope = parse_envelope(receipt, source)
            theirs = [] if envelope is None else envelope.key_ids
            if theirs != ours:
                raise InputError(
                    f"{source}, is {_signed_by(theirs)}, but this run's receipts would be "
                    f"{_signed_by(ours)}; give the --sign_key of the run that is continued, or "
                    "name a new output and a new file of receipts"
                )

    def _receipt(self, result: Result) -> dict[str, Any]:
        statement = make_statement(result, private=self._private)
        return statement if self._signer is None else self._signer(statement)

    def _write(self, row: dict[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            while text:
                text = text[self._file.write(text) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}); make room for it"
            ) from None


def _signed_by(key_ids: Sequence[str]) -> str:
    return f"signed by key {' and '.join(key_ids):.160}" if key_ids else "not signed"
