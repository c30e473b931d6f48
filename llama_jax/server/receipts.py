"""ReceiptStore: the runs of the last answers, kept for those who ask for their receipts."""

import collections
import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from llama_jax.engine.result import Result
from llama_jax.server.errors import NO_RECEIPT, ApiError

MAX_BYTES = 256 * 2**20
"""Of memory for all runs that are kept: 3,400 of 256 tokens, 230 of 4,096."""

_RUN_BYTES, _DRAW_BYTES, _TOKEN_BYTES, _MESSAGE_BYTES, _BIAS_BYTES = 6144, 272, 36, 256, 128


class ReceiptStore:
    """The runs of the last answers, by the ids of their receipts; any thread may use it.

    A run is kept as it is. Its receipt is made when it is asked for, which takes 8 us a token and
    would be wasted for most of them.

    Args:
        limit: how many runs are kept, the latest that ended; 0: none.
        private: see `Result.receipt`.
        signer: makes a signed receipt of a receipt; None: they are not signed.
        max_bytes: of memory that they take together, by `size_of`.
    """

    def __init__(
        self,
        limit: int,
        *,
        private: bool = False,
        signer: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        max_bytes: int = MAX_BYTES,
    ):
        self.limit, self._private, self._max_bytes = limit, private, max_bytes
        self._signer = signer
        self.held = 0
        """Bytes of memory that the runs take."""
        self._kept: collections.OrderedDict[str, tuple[Result, int]] = collections.OrderedDict()
        self._under_way: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def expect(self, receipt_id: str) -> None:
        """Note that a run is under way."""
        if self.limit:
            with self._lock:
                self._under_way.add(receipt_id)

    def end(self, receipt_id: str, result: Result | None) -> None:
        """Keep a run that is under way, once; None: it ended by an error.

        The oldest ones make room.
        """
        if receipt_id not in self._under_way:
            return
        size = 0
        if result is not None:  # what it was asked for beside its text is no part of a receipt
            result = dataclasses.replace(result, logprobs=None, prompt_logprobs=None)
            size = size_of(result)
        with self._lock:
            if receipt_id not in self._under_way:
                return
            self._under_way.remove(receipt_id)
            if result is None:
                return
            self._kept[receipt_id] = result, size
            self.held += size
            while len(self._kept) > self.limit or self.held > self._max_bytes:
                _, (_, dropped) = self._kept.popitem(last=False)
                self.held -= dropped

    def statement(self, receipt_id: str) -> dict[str, Any]:
        """Return a receipt.

        Raises:
            ApiError: it is not here, with the reason.
        """
        with self._lock:
            result, _ = self._kept.get(receipt_id, (None, 0))
            is_under_way = receipt_id in self._under_way
        if result is None:
            self._refuse(receipt_id, is_under_way)
        return self.make(result)

    def make(self, result: Result) -> dict[str, Any]:
        """Return the receipt of a result, whether or not its run is kept, signed if so set."""
        statement = result.receipt(private=self._private)
        return statement if self._signer is None else self._signer(statement)

    def _refuse(self, receipt_id: str, is_under_way: bool) -> NoReturn:
        if not self.limit:
            reason = "this server keeps none; start it with --receipts=N"
        elif is_under_way:
            reason = "its answer has not ended; ask again when it has"
        else:
            reason = (
                f"expected an x-receipt-id of one of the answers that ended last ({len(self):,} "
                "are here); ask sooner, or start the server with a larger --receipts"
            )
        raise ApiError(NO_RECEIPT, receipt_id, reason)


def receipt_ids(request_id: str, count: int) -> list[str]:
    """Return the ids of the receipts of a request's answers: the request's own, `ID.1`, `ID.2`."""
    return [f"{request_id}.{number}" if number else request_id for number in range(count)]


def size_of(result: Result) -> int:
    """Return how many bytes of memory a run takes: counted by its parts, not one by one."""
    record = result.record
    assert record is not None, "a result of the engine has its record"
    request, parameters = record.request, result.parameters
    messages = request.messages or ()
    texts = [text for message in messages for text in message.values()]
    texts += [result.response or "", request.raw_prompt or "", *parameters.stop, *result.warnings]
    ids = (result.prompt_tokens, request.prompt_tokens or (), parameters.allowed_tokens or ())
    return (
        _RUN_BYTES
        + _DRAW_BYTES * len(record.draws)
        + _TOKEN_BYTES * sum(map(len, ids))
        + _MESSAGE_BYTES * len(messages)
        + _BIAS_BYTES * len(parameters.logit_bias)
        + sum(map(sys.getsizeof, texts))
    )
