"""Worker: a model in an actor of Ray Data's, which answers lines of requests."""

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from llama_jax.batch.line import (
    Format,
    Line,
    answer_lines,
    encode_row,
    parse,
    refused_row,
    request_format,
)
from llama_jax.decode.compile_cache import use_compile_cache
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.ray.ledger import MOST_ENDS
from llama_jax.ray.turns import Turns

_LOGGER = logging.getLogger("llama_jax.ray")

REQUESTS = pa.schema([("line", pa.int64()), ("text", pa.binary()), ("first", pa.int64())])
"""What a worker reads: a line's number from 1, its JSON, and the first line of its `custom_id`,
0 if it has none."""

ROWS = pa.schema(
    [
        ("line", pa.int64()),
        ("row", pa.binary()),
        ("tokens", pa.int64()),
        ("fingerprint", pa.string()),
        ("worker", pa.string()),
    ]
)
"""What it answers: the line's number and its line of output in JSON, the tokens drawn for it, the
model's fingerprint, and the process that answered."""


class Request(NamedTuple):
    """A line of input; see REQUESTS."""

    line: int
    text: bytes
    first: int


class Worker:
    """A class for `Dataset.map_batches`: loads a model once, and answers tables of lines.

    Calls may come from several threads at once: they share the model's slots. A table in the form
    of `REQUESTS` gives one in the form of `ROWS`. A wrong line gets an error of its own. Whatever
    else is raised ends the process: the engine may be broken, and Ray makes a new one.

    Args:
        load: arguments of `Llama.load`.
        seed: the job's, from which lines without a seed get theirs; see `line_seed`.
        calls: the most at once.
        ledger: the handle of a `Ledger`; None: a line that ends the process is tried for ever.
        format_of: returns the format of a line's fields.
    """

    def __init__(
        self,
        load: Mapping[str, Any],
        *,
        seed: int = 0,
        calls: int = 1,
        ledger: Any = None,
        format_of: Callable[[Any], Format] = request_format,
    ):
        self._seed, self._ledger, self._format_of = seed, ledger, format_of
        self._turns = Turns(calls)
        if ledger is not None and not ray.get(ledger.start.remote()):
            raise RuntimeError("workers start and end without an answer; their logs say why")
        if warning := use_compile_cache():
            _LOGGER.warning(warning)
        self.llm = Llama.load(**load)
        self._name = f"{platform.node()}:{os.getpid()}"

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer the lines of a table, as many at once as there are slots."""
        columns = (table[name].to_pylist() for name in REQUESTS.names)
        requests = [Request(*values) for values in zip(*columns, strict=True)]
        rows = self._answer_together(requests)
        if rows is None:
            rows = [self._answer_alone(request) for request in requests]
        return pa.Table.from_pylist(rows, ROWS)

    def _answer_together(self, requests: Sequence[Request]) -> list[dict[str, Any]] | None:
        """Answer lines beside each other; None: one of them may have ended a process, and only
        alone it is known which."""
        numbers = [request.line for request in requests]
        with self._turns.take(alone=False):
            if self._ledger is not None and any(
                ray.get(self._ledger.begin.remote(numbers, alone=False))
            ):
                return None
            return self._answer(requests)

    def _answer_alone(self, request: Request) -> dict[str, Any]:
        """Answer a line beside no other, unless it ended too many processes."""
        with self._turns.take(alone=True):
            [ends] = ray.get(self._ledger.begin.remote([request.line], alone=True))
            if ends < MOST_ENDS:
                return self._answer([request])[0]
            error = InputError(f"this request ended {ends} workers, one after the other")
            self._ledger.end.remote([request.line])
            return self._row(request, refused_row(request.line, request.text, error), 0)

    def _answer(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        try:
            answered = list(answer_lines(map(self._line, requests), self.llm))
        except Exception:
            # It is the engine's or a bug's. Later calls would fail too, and look like bad requests.
            _LOGGER.exception("the worker ends: Ray starts another and tries its lines again")
            logging.shutdown()
            os._exit(1)
        if self._ledger is not None:
            ray.get(self._ledger.end.remote([request.line for request in requests]))
        return [
            self._row(request, line.output(), sum(len(result.tokens) for result in line.results))
            for request, line in zip(requests, answered, strict=True)
        ]

    def _line(self, request: Request) -> Line:
        ids: dict[str | int, int] = {}
        if request.first not in (0, request.line):
            ids[parse(request.text)["custom_id"]] = request.first
        return Line(request.line, request.text, ids, self.llm, self._format_of, self._seed)

    def _row(self, request: Request, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        return {
            "line": request.line,
            "row": encode_row(dict(row)),
            "tokens": tokens,
            "fingerprint": self.llm.engine.fingerprint,
            "worker": self._name,
        }
