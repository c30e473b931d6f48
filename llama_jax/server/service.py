"""Service: the engine as the event loop sees it. One thread runs it; calls await its answers."""

import asyncio
import contextlib
import functools
import logging
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence

from llama_jax.engine.generation import Generation
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Piece, Result
from llama_jax.llama import Llama
from llama_jax.server.errors import UNAVAILABLE, ApiError
from llama_jax.server.in_thread import in_thread
from llama_jax.server.request_log import RequestLog
from llama_jax.server.settings import Settings

MAX_ANSWERS = 256
"""That one call may ask for, however long the queue may get."""

JOIN_S = 5.0
"""How long a server that stops waits for its engine."""

_LOGGER = logging.getLogger("llama_jax.server")


class Service:
    """A model at work for many clients.

    Args:
        llm: what answers.
        settings: the server's.
        on_warm_up: called, in the engine's thread, with programs compiled and of how many.
    """

    def __init__(
        self,
        llm: Llama,
        settings: Settings,
        on_warm_up: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.llm, self.settings = llm, settings
        self._on_warm_up = on_warm_up
        self._stopping = threading.Event()
        self._warm = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        compile_wanted = functools.partial(llm.engine.compile_wanted, self._stopping)
        self._compiler = threading.Thread(target=compile_wanted, name="compiler", daemon=True)
        self._draining = False
        self.failed = False
        """Whether the engine ended by itself."""
        self._answers: weakref.WeakSet[Answers] = weakref.WeakSet()
        self._answers_lock = threading.RLock()  # a signal's handler may interrupt `answer`

    @property
    def unready(self) -> str | None:
        """Why requests are not accepted; None: they are."""
        if self._draining:
            return "shutting down"
        if self.failed:
            return "broken"
        return None if self._warm.is_set() else "warming up"

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.unready is None

    @property
    def most_answers(self) -> int:
        """The most generations of one HTTP request: an idle server has room for them."""
        queue = self.llm.engine.max_queue
        room = MAX_ANSWERS if queue is None else self.llm.executor.batch + queue
        return min(room, MAX_ANSWERS)

    def start(self) -> None:
        """Start to warm up, and then to accept requests."""
        self._thread.start()
        if self.settings.warm_up:
            self._compiler.start()

    def drain(self) -> None:
        """Accept no more requests; those in flight go on."""
        self._draining = True

    def cancel_all(self) -> None:
        """Cancel all requests in flight."""
        for answers in self._all_answers():
            answers.cancel()

    def stop(self) -> None:
        """Make the engine's threads end after the turn, or the compilation, that each is in."""
        self.drain()
        self.cancel_all()
        self._stopping.set()
        self.llm.engine.wake()

    def join(self) -> bool:
        """Wait JOIN_S seconds for the engine's threads to end after `stop`; return whether they do.

        A compilation cannot be interrupted, and may take minutes.
        """
        deadline = time.monotonic() + JOIN_S
        threads = [thread for thread in (self._thread, self._compiler) if thread.ident is not None]
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    async def answer(self, log: RequestLog, requests: Sequence[GenerationRequest]) -> "Answers":
        """Submit the generations of one HTTP request: all of them or none.

        Raises:
            ApiError: the model is not ready, or not any more.
            InputError: see `Engine.submit`.
            QueueFullError: there is no room for all of them.
        """
        answers = Answers(log, log.began + self.settings.timeout_s)
        with self._answers_lock:
            self._answers.add(answers)
        if self.unready:  # asked after it is listed: an engine that ends now abandons it
            raise ApiError(UNAVAILABLE, f"it is {self.unready}")
        try:
            # In a thread: encoding a prompt of megabytes would block all other requests.
            submit = functools.partial(
                self.llm.engine.submit,
                client=log.client,
                share=self.settings.max_queue_per_client,
                max_slots=self.settings.max_slots_per_client,
            )
            await in_thread(answers.submit, submit, requests, on_cancel=answers.cancel)
        except BaseException:  # a cancelled request too: nobody reads what was submitted
            answers.cancel()
            raise
        lengths = list(map(len, answers.prompts))
        log.prompt_tokens, log.longest_prompt = sum(lengths), max(lengths)
        return answers

    def _work(self) -> None:
        """Run the engine; the whole life of its thread."""
        try:
            if self.settings.warm_up:
                for done, total in self.llm.engine.warm_up():
                    self._on_warm_up(done, total)
                    if self._stopping.is_set():
                        return
            self._warm.set()
            self.llm.engine.run(self._stopping)
        except BaseException:  # whatever it is, the server must learn that its engine is gone
            _LOGGER.exception("the engine stopped")
            self.failed = True
            for answers in self._all_answers():
                answers.abandon()

    def _all_answers(self) -> "list[Answers]":
        with self._answers_lock:
            return list(self._answers)


class Answers:
    """The generations of one HTTP request, read in the event loop as they come.

    Args:
        log: the request's, which records what comes.
        deadline: when its time is up, on the clock of `time.perf_counter`.
    """

    def __init__(self, log: RequestLog, deadline: float):
        self._log, self._deadline = log, deadline
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._generations: list[Generation] = []
        self._cancelled = self._abandoned = False

    def submit(
        self,
        submit: Callable[[GenerationRequest, Callable[[], None]], Generation],
        requests: Sequence[GenerationRequest],
    ) -> None:
        """Give requests to the engine; may be called in any thread."""
        for request in requests:
            generation = submit(request, self._on_change)
            self._generations.append(generation)
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
        self._on_change()

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

    def _on_change(self) -> None:
        """Wake the reader up; runs in the engine's thread."""
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
