"""Answers: the generations of one HTTP request, read in the event loop as they come."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from llama_jax.engine.generation import Generation
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Piece, Result
from llama_jax.server.errors import UNAVAILABLE, ApiError
from llama_jax.server.receipts import ReceiptStore, receipt_ids
from llama_jax.server.request_log import RequestLog


class Answers:
    """The generations of one HTTP request, read in the event loop as they come.

    Args:
        log: the request's, which records what comes.
        deadline: when its time is up, on the clock of `time.perf_counter`.
        receipts: where their runs are kept as they end, whether or not somebody reads them.
    """

    def __init__(self, log: RequestLog, deadline: float, receipts: ReceiptStore):
        self._log, self._deadline, self._receipts = log, deadline, receipts
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._generations: list[Generation] = []
        self.receipt_ids: list[str] = []
        """The names of the runs, by which their receipts are found."""
        self._cancelled = self._abandoned = False

    def submit(
        self,
        submit: Callable[..., Generation],
        requests: Sequence[GenerationRequest],
    ) -> None:
        """Give requests to the engine; may be called in any thread.

        Args:
            submit: `Engine.submit`, with what is the same for all.
            requests: at least one.
        """
        self.receipt_ids = receipt_ids(self._log.id, len(requests))
        for number, (request, name) in enumerate(zip(requests, self.receipt_ids, strict=True)):
            self._receipts.expect(name)
            on_change = functools.partial(self._on_change, number)
            try:
                generation = submit(request, on_change, invocation=name)
            except BaseException:  # whatever it is: no run of that name will come
                self._receipts.end(name, None)
                raise
            self._generations.append(generation)
            self._keep(number)  # it may have ended before it was listed
            if self._cancelled:  # checked after it was listed: `cancel` has seen it, or this has
                return generation.cancel()
        return None

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [generation.prompt for generation in self._generations]

    @property
    def seeds(self) -> list[int]:
        """The seed of each."""
        return [generation.request.parameters.seed for generation in self._generations]

    def cancel(self) -> None:
        """Cancel them; each frees its slot at the engine's next turn."""
        self._cancelled = True
        for generation in list(self._generations):
            generation.cancel()

    def abandon(self) -> None:
        """End them by an error: no engine works on them any more; may be called in any thread."""
        self._abandoned = True
        self._wake()

    async def stream(self) -> AsyncGenerator[tuple[int, Piece | Result], None]:
        """Yield each generation's pieces and then its result, with its number, as they come.

        However the reader leaves, what it has not read is cancelled.

        Raises:
            TimeoutError: the deadline has passed.
            ApiError: the server cancelled it.
            Exception: what ended a generation.
        """
        waiting = dict(enumerate(self._generations))
        try:
            while waiting:
                self._changed.clear()
                for number, generation in list(waiting.items()):
                    done = generation.done  # read first: the last piece comes before the end
                    if (piece := _take_all(generation)) is not None:
                        self._log.record_tokens(len(piece.tokens))
                        yield number, piece
                    if done:
                        del waiting[number]
                        self._keep(number)  # before the client learns that it has ended
                        yield number, self._result(generation)
                if waiting:
                    if self._abandoned:
                        raise ApiError(UNAVAILABLE, "it is broken")
                    async with asyncio.timeout(max(0, self._deadline - time.perf_counter())):
                        await self._changed.wait()
        finally:
            self.cancel()

    async def results(self) -> list[Result]:
        """Wait for all of them; raise as `stream` does."""
        results: dict[int, Result] = {}
        async with contextlib.aclosing(self.stream()) as parts:
            async for number, part in parts:
                if isinstance(part, Result):
                    results[number] = part
        return [results[number] for number in sorted(results)]

    def _result(self, generation: Generation) -> Result:
        if generation.error is not None:
            generation.raise_error()
        result = generation.result
        assert result is not None
        if result.finish_reason == "cancelled":
            raise ApiError(UNAVAILABLE, "it is shutting down")
        self._log.results.append(result)
        return result

    def _on_change(self, number: int) -> None:
        """Keep the run of a generation that has ended; runs in the engine's thread."""
        self._keep(number)
        self._wake()

    def _keep(self, number: int) -> None:
        """Keep the run of a generation if it is listed and has ended."""
        if number < len(self._generations) and (generation := self._generations[number]).done:
            self._receipts.end(self.receipt_ids[number], generation.result)

    def _wake(self) -> None:
        """Wake the reader up; may be called in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._changed.set)


def _take_all(generation: Generation) -> Piece | None:
    """Return all that has come of a generation as one piece: one event for the client, not many."""
    pieces = list(iter(generation.take, None))
    if not pieces:
        return None
    return Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [logprob for piece in pieces for logprob in piece.logprobs],
    )
