"""Engine: many generations at once on one executor, with continuous batching.

A fixed number of slots, and one queue, in which clients take turns. `Scheduler` decides what a turn
does; this is the part that many threads may call.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax

from llama_jax.decode.executor import Executor
from llama_jax.engine.clock import Clock
from llama_jax.engine.counts import Counts
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.environment import UNKNOWN, Environment
from llama_jax.engine.fair_lock import FairLock
from llama_jax.engine.fit import fit
from llama_jax.engine.frames import drop_locals
from llama_jax.engine.generation import Generation
from llama_jax.engine.queue import Queue
from llama_jax.engine.refusals import (
    ClientShareError,
    EngineFailedError,
    QueueFullError,
)
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.waiting import Waiting
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer

T = TypeVar("T")

_LOGGER = logging.getLogger("llama_jax.engine")

MAX_FAILURES = 3
"""Failed turns in a row, with no request that ended well between: `Engine.run` gives up."""


class Engine:
    """Generate for many requests at once.

    `submit` takes a request at any time, from any thread; `step` does the work. Whoever waits for
    a generation calls `step` until it is done, or one thread runs `run` for all.

    Args:
        executor: its batch is the number of slots.
        tokenizer: None if the model has none.
        environment: what results are to carry.
        max_queue: requests that may wait beyond those in slots; None: any number.
        reuse: let a prompt reuse what slots hold.
        drafter: what proposes tokens, if the executor's plan has `draft_tokens`.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        environment: Environment = UNKNOWN,
        max_queue: int | None = None,
        reuse: bool = True,
        drafter: Drafter | None = None,
    ):
        self.executor, self.tokenizer = executor, tokenizer
        self.environment, self.max_queue = environment, max_queue
        self._clock = Clock(executor.compiled, *(drafter.compiled if drafter else ()))
        self._queue = Queue()
        self._waiting = Waiting(self._queue)
        assert (drafter is None) == (executor.plan.draft_tokens == 0), executor.plan
        self._drafter = drafter
        self._scheduler = Scheduler(
            executor, self._waiting, self._clock, reuse=reuse, drafter=drafter
        )
        self._turn_lock, self._submit_lock = FairLock(), threading.Lock()
        self._work = threading.Event()
        self._failed: EngineFailedError | None = None

    @property
    def fingerprint(self) -> str:
        """The environment's."""
        return self.environment.fingerprint

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._scheduler.counts

    @property
    def queued(self) -> int:
        """Live requests that wait for a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Slots that live requests use."""
        return self._scheduler.running

    @property
    def background(self) -> tuple[int, int]:
        """Work in the background: how many of it have slots, and how many wait."""
        return self._scheduler.running_background, self._waiting.num_background

    def has_room(self, client: str = "") -> bool:
        """Return whether another request of a client would be accepted."""
        if self.max_queue is None:
            return True
        places = self.max_queue - self._queue.kept(client, self.max_queue)
        return self.queued < places + self.executor.batch - self.running

    def submit(
        self,
        request: GenerationRequest,
        on_change: Callable[[], None] | None = None,
        *,
        client: str = "",
        share: int | None = None,
        max_slots: int | None = None,
        invocation: str = "",
        background: bool = False,
        streamed: bool = False,
    ) -> Generation:
        """Queue a request.

        Args:
            request: what to generate.
            on_change: called in the engine's thread when there is something new; must not block.
            client: whose it is; clients take turns, see `Queue`.
            share: requests of one client that may wait beyond free slots; None: `max_queue`.
            max_slots: slots that the client may have while others are active; None: all but one.
            invocation: what its record is to name it; "": one is made up.
            background: it has slots that no live request needs, see `Waiting`; any number waits.
            streamed: somebody reads it as it comes; see `Bursts`.

        Raises:
            InputError: text without a tokenizer, or ids outside the vocabulary; speculation in
                several processes without lockstep.
            ContextError: prompt and max_tokens, or 1 token if none is given, do not fit the
                context.
            QueueFullError: the queue is full, or the client's share of it (ClientShareError).
            EngineFailedError: `run` gave up.
        """
        self._check_processes()
        vocab_size = self.executor.config.vocab_size
        prompt = request.encode(self.tokenizer, vocab_size)
        drawable = vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        request.parameters.check_token_ids(drawable)
        request = fit(request, len(prompt), self.executor.context)
        generation = Generation(
            request,
            prompt,
            self.tokenizer,
            eos_tokens=self.executor.config.eos_tokens,
            clock=self._clock,
            environment=self.environment,
            on_change=on_change,
            client=client,
            max_slots=max_slots,
            invocation=invocation,
        )
        generation.background, generation.streamed = background, streamed
        if not generation.done:  # what it continues may have ended
            self._enqueue(generation, share)
        return generation

    def _check_processes(self) -> None:
        """Refuse to speculate in processes that decide by themselves: it depends on time."""
        if self._drafter is not None and self.executor.lockstep is None and jax.process_count() > 1:
            raise InputError(
                "several processes speculate, and none tells the others of its calls; load the "
                "model with a lockstep, or with speculate off"
            )

    def _enqueue(self, generation: Generation, share: int | None) -> None:
        """Put a generation into the queue, if there is room for it."""
        with self._submit_lock:
            if self._failed is not None:
                raise EngineFailedError(*self._failed.args)
            if generation.background:
                self._waiting.append(generation)
                self._work.set()
                return
            if not self.has_room(generation.client):
                raise QueueFullError(f"{self.queued} requests wait already; try again later")
            own, free = self._queue.count(generation.client), self.executor.batch - self.running
            if share is not None and own >= share + free:
                raise ClientShareError(
                    f"{own} requests of this client wait already; try again later"
                )
            self._queue.append(generation)
        self._work.set()

    def run(self, stopping: threading.Event) -> None:
        """Do all that is submitted until `stopping` is set; `wake` then makes it look.

        Raises:
            EngineFailedError: MAX_FAILURES turns failed, and no request ended well between.
        """
        while True:
            self._work.clear()  # before the question: what wakes it after that is not missed
            if stopping.is_set():
                return
            if not self.step():
                self._work.wait()
            if self._scheduler.failures >= MAX_FAILURES:
                self._give_up()

    def _give_up(self) -> NoReturn:
        """End the requests in the queue too, and accept no more."""
        failures = self._scheduler.failures
        error = EngineFailedError(
            f"the engine failed {failures} times in a row; start a new process"
        )
        with self._submit_lock:
            self._failed = error
        self._scheduler.fail_queue(error)
        raise error

    def wake(self) -> None:
        """Make `run` and `compile_wanted` look again whether there is something to do."""
        self._work.set()
        self.executor.programs.wanted.put(None)

    def step(self, skip_if: Callable[[], bool] = lambda: False) -> bool:
        """Do one turn of work; return whether there is more.

        A request that fails is ended by its error, and harms no other. If the device fails, all
        requests in slots are ended by that error; those in the queue go on.

        Args:
            skip_if: called when no other thread is at work; true: the turn is not needed any more.
        """
        with self._turn_lock:
            if skip_if():
                return True
            self._clock.start()
            try:
                return self._scheduler.turn()
            except BaseException as error:  # an interrupt too: the state was given away
                drop_locals(error)
                self._scheduler.fail_all(error)
                if not isinstance(error, Exception):
                    raise
                if self.executor.lockstep is not None:
                    self.executor.lockstep.fail(error)
                return True
            finally:
                self._clock.update()

    def between_turns(self, work: Callable[[Executor], T]) -> T:
        """Return what a function does with the executor, between two turns.

        So the time it takes, compiling included, belongs to no generation.
        """
        with self._turn_lock:
            return work(self.executor)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Allocate the caches and compile programs that serve every request.

        So no request finds that there is no memory. Others may use the engine meanwhile.

        Yields:
            (done, total) after each program.
        """
        with self._turn_lock:
            self._scheduler.pipeline.allocate()
        drafter, done, total = self._drafter, 0, 0
        more = 0 if drafter is None else drafter.num_programs
        for done, total in self.executor.warm_up():
            yield done, total + more
        if drafter is not None:
            with self._turn_lock:
                drafter.allocate()
            for also_done, _ in drafter.warm_up():
                yield done + also_done, total + more

    def compile_wanted(self, stopping: threading.Event) -> None:
        """Compile, beside the turns, programs that serve the requests so far in less time.

        Until `stopping` is set; `wake` then makes it look. A program that cannot be compiled is
        left out.
        """
        wanted = self.executor.programs.wanted
        while not stopping.is_set():
            if (program := wanted.get()) is None or stopping.is_set():
                continue
            try:
                self.executor.compile(program)
            except Exception:
                _LOGGER.exception("%s is not compiled; a slower program serves", program)
