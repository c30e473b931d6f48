"""ReceiptFile: receipts that are appended to a file, each on a line."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.engine.result import Result
from llama_jax.errors import InputError
from llama_jax.provenance.statement import make_statement
from llama_jax.regular_file import check_regular


def unsigned(statement: dict[str, Any]) -> dict[str, Any]:
    """Return a statement as it is."""
    return statement


class ReceiptFile:
    """A file of receipts; what it holds stays. A context manager that closes it.

    Args:
        path: created, or appended to.
        private: see `Result.receipt`.
        seal: makes of a statement what is written; see `envelope.Signer`.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        private: bool = False,
        seal: Callable[[dict[str, Any]], dict[str, Any]] = unsigned,
    ):
        self.path, self._private, self._seal = pathlib.Path(path), private, seal
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
            InputError: there are fewer.
        """
        self._file.seek(0)
        size = 0
        for number in range(count):
            if not (line := self._file.readline()).endswith(b"\n"):
                raise InputError(
                    f"{self.path} has {number:,} receipts, but the output has {count:,} results; "
                    "name the file of these results, or a new output and a new file of receipts"
                )
            size += len(line)
        self._file.truncate(size)

    def _receipt(self, result: Result) -> dict[str, Any]:
        return self._seal(make_statement(result, private=self._private))

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
