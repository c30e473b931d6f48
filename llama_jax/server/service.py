"""Service: the engine as the event loop sees it. One thread runs it; calls await its answers."""

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from llama_jax.engine.request import GenerationRequest
from llama_jax.llama import Llama
from llama_jax.provenance.statement import check_digest
from llama_jax.server.answers import Answers
from llama_jax.server.batches.batches import Batches
from llama_jax.server.errors import UNAVAILABLE, ApiError
from llama_jax.server.in_thread import in_thread
from llama_jax.server.receipts import ReceiptStore
from llama_jax.server.request_log import RequestLog
from llama_jax.server.settings import MAX_ANSWERS, Settings

JOIN_S = 5.0
"""How long a server that stops waits for its engine."""

_LOGGER = logging.getLogger("llama_jax.server")


class Service:
    """A model at work for many clients.

    Args:
        llm: what answers.
        settings: the server's.
        on_warm_up: called, in the engine's thread, with programs compiled and of how many.

    Raises:
        InputError: receipts are to be kept, and the weights have no digest; or the folder of
            batches cannot be used.
    """

    def __init__(
        self,
        llm: Llama,
        settings: Settings,
        on_warm_up: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.llm, self.settings = llm, settings
        self.receipts = ReceiptStore(
            settings.receipts, private=settings.private_receipts, signer=settings.signer
        )
        """Of the last answers."""
        if settings.receipts:
            check_digest(llm.engine.environment)
        self.batches: Batches | None = None
        """What is stored of batches; None: nothing is."""
        if settings.batches is not None:
            self.batches = Batches(llm, settings, settings.batches)
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
        if self.batches is not None:
            self.batches.start()
        if self.settings.warm_up:
            self._compiler.start()

    def drain(self) -> None:
        """Accept no more requests; those in flight go on, and batches are broken off."""
        self._draining = True
        if self.batches is not None:
            self.batches.stop()

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
        if self.batches is not None and not self.batches.join(max(0, deadline - time.monotonic())):
            return False
        return not any(thread.is_alive() for thread in threads)

    async def answer(
        self, log: RequestLog, requests: Sequence[GenerationRequest], *, streamed: bool
    ) -> Answers:
        """Submit the generations of one HTTP request: all of them or none.

        Args:
            log: the request's.
            requests: what to generate.
            streamed: the client reads them as they come.

        Raises:
            ApiError: the model is not ready, or not any more.
            InputError: see `Engine.submit`.
            QueueFullError: there is no room for all of them.
        """
        answers = Answers(log, log.began + self.settings.timeout_s, self.receipts)
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
                streamed=streamed,
            )
            await in_thread(answers.submit, submit, requests, on_cancel=answers.cancel)
        except BaseException:  # a cancelled request too: nobody reads what was submitted
            answers.cancel()
            raise
        lengths = list(map(len, answers.prompts))
        log.receipt_ids = answers.receipt_ids if self.receipts.limit else []
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
            if self.batches is not None:
                self.batches.go()
            self.llm.engine.run(self._stopping)
        except BaseException:  # whatever it is, the server must learn that its engine is gone
            _LOGGER.exception("the engine stopped")
            self.failed = True
            for answers in self._all_answers():
                answers.abandon()

    def _all_answers(self) -> list[Answers]:
        with self._answers_lock:
            return list(self._answers)
