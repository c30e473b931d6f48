"""Engine: many generations at once on one executor. All that generates is driven by it.

A fixed number of slots, each a row of the executor's state. Requests wait in one queue, first come
first served. A turn of the engine reads a bounded piece of the next prompts, so that a long one
does not hold up the answers under way, and then draws some tokens of every answer.

What a slot's cache holds stays there when its request has ended: a prompt that begins with the same
tokens, such as a system prompt or the turns before, need not read them again. It makes no
difference to the tokens drawn (tests/test_engine.py).
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.decode import sampling
from llama_jax.decode.executor import Executor
from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.decode.state import DecodeState, make_admission
from llama_jax.decode.steps import Logprobs, StepOutputs
from llama_jax.engine.generation import Clock, Generation, token_logprobs
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import FinishReason
from llama_jax.engine.slots import Slot, assign_slot
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer


class ContextError(InputError):
    """The prompt and max_tokens do not fit the context together."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int):
        super().__init__(
            f"prompt has {prompt_tokens:,} tokens and max_tokens is {max_tokens:,}, "
            f"but the context holds {context:,}; shorten the prompt or lower max_tokens"
        )
        self.asked, self.context = prompt_tokens + max_tokens, context


class QueueFullError(Exception):
    """As many requests wait as may; try again later."""


@dataclasses.dataclass
class Counts:
    """What the engine has done since it was made."""

    prompt_tokens: int = 0
    """Of all requests that got a slot."""
    reused_tokens: int = 0
    """Of those, the ones that were in the cache already."""
    tokens: int = 0
    """Drawn."""
    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    """Requests by their finish reason, or `error`."""


@dataclasses.dataclass
class _PrefillInProgress:
    """A prompt on its way into a slot."""

    slot: Slot
    generation: Generation
    chunks: collections.deque[tuple[int, int]]
    """Those not read yet: (start, size)."""


@dataclasses.dataclass
class _InFlight:
    """Arrays that the device is working on, and whose they are."""

    drawn: StepOutputs
    columns: list[tuple[Slot, Generation, int]]
    prompt_logprobs: tuple[Generation, Logprobs, list[int]] | None = None


class Engine:
    """Generate for many requests at once.

    `submit` takes a request at any time, from any thread; `step` does the work. Whoever waits for
    a generation calls `step` until it is done, or one thread runs `run` for all.

    Args:
        executor: its batch is the number of slots.
        tokenizer: None if the model has none.
        fingerprint: what results are to carry.
        max_queue: requests that may wait beyond those in slots; None: any number.
        reuse: let a prompt reuse what slots hold.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        fingerprint: str = "",
        max_queue: int | None = None,
        reuse: bool = True,
    ):
        self.executor, self.tokenizer = executor, tokenizer
        self.fingerprint, self.max_queue, self.reuse = fingerprint, max_queue, reuse
        self.counts = Counts()
        self._clock = Clock()
        self._slots = [Slot(row) for row in range(executor.batch)]
        self._queue: collections.deque[Generation] = collections.deque()
        self._reading: _PrefillInProgress | None = None
        self._dispatched: collections.deque[_InFlight] = collections.deque()
        self._state: DecodeState | None = None
        self._admitted = itertools.count(1)
        self._turn_lock, self._submit_lock = threading.Lock(), threading.Lock()
        self._work = threading.Event()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(slot.generation is not None for slot in self._slots)

    @property
    def has_room(self) -> bool:
        """Whether another request would be taken in."""
        free = len(self._slots) - self.running
        return self.max_queue is None or self.queued < self.max_queue + free

    def submit(
        self, request: GenerationRequest, on_change: Callable[[], None] | None = None
    ) -> Generation:
        """Take a request in.

        Args:
            request: what to generate.
            on_change: called in the engine's thread when there is something new; must not block.

        Raises:
            InputError: text without a tokenizer, or ids outside the vocabulary.
            ContextError: prompt and max_tokens do not fit the context.
            QueueFullError: as many requests wait as may.
        """
        prompt = request.encode(self.tokenizer, self.executor.config.vocab_size)
        context = self.executor.context
        if len(prompt) + request.parameters.max_tokens > context:
            raise ContextError(len(prompt), request.parameters.max_tokens, context)
        generation = Generation(
            request,
            prompt,
            self.tokenizer,
            clock=self._clock,
            fingerprint=self.fingerprint,
            on_change=on_change,
        )
        with self._submit_lock:
            if not self.has_room:
                raise QueueFullError(f"{self.queued} requests wait already; try again later")
            self._queue.append(generation)
        self._work.set()
        return generation

    def run(self, stopping: threading.Event) -> None:
        """Do all that is submitted, until told to stop; `wake` then lets it notice."""
        while True:
            self._work.clear()  # before the question: what wakes it after that is not missed
            if stopping.is_set():
                return
            if not self.step():
                self._work.wait()

    def wake(self) -> None:
        """Let `run` look again whether there is something to do."""
        self._work.set()

    def step(self, skip_if: Callable[[], bool] = lambda: False) -> bool:
        """Do one turn of work; return whether there is more.

        A request that fails is ended by its error, and harms no other. If the device fails, all
        that were in slots are ended by that error; the ones in the queue go on.

        Args:
            unless: asked when no other thread is at work any more: whether what its turn has done
                is all that was waited for.
        """
        with self._turn_lock:
            if skip_if():
                return True
            began, compiled = time.perf_counter(), self.executor.compiled.seconds
            self._turn_began = (began, compiled)
            try:
                return self._turn()
            except BaseException as error:  # an interrupt too: the state was given away
                self._give_up(error)
                if not isinstance(error, Exception):
                    raise
                return True
            finally:
                self._tick()

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the float32 logits [T, V] after each token of a text; no turn is made meanwhile.

        So what it compiles is no part of the time that any generation took.
        """
        with self._turn_lock:
            return self.executor.score(tokens)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile all that any request can need; yield (done, of how many)."""
        yield from self.executor.warm_up()

    # One turn.

    def _turn(self) -> bool:
        self._end_early()
        self._read_prompts()
        self._draw()
        return bool(self._queue or self._dispatched or self.running)

    def _end_early(self) -> None:
        """End what was cancelled, and what asks for no token: that needs no slot."""
        for generation in [g for g in list(self._queue) if g.cancelled or g.is_empty]:
            self._queue.remove(generation)
            self._end(generation, "cancelled" if generation.cancelled else "length")
        for slot in self._slots:
            if slot.generation is not None and slot.generation.cancelled:
                self._end(slot.generation, "cancelled")
                self._free(slot)

    def _read_prompts(self) -> None:
        """Read as many tokens of the next prompts as one chunk has at most."""
        budget = self.executor.plan.prefill_sizes[-1]
        while True:
            self._reading = self._reading or self._admit()
            if self._reading is None:
                return
            _, size = self._reading.chunks[0]
            if size > budget:
                return
            budget -= size
            self._read_chunk(self._reading)

    def _admit(self) -> _PrefillInProgress | None:
        """Give the next request in the queue a slot, if there is one."""
        if self.running == len(self._slots) or not self._queue:
            return None
        generation = self._queue[0]
        request, prompt, run = generation.request, generation.prompt, self.executor
        reuse = self.reuse and not request.parameters.prompt_logprobs  # those need every token read
        choice = assign_slot(self._slots, prompt, run.plan.reuse_multiple if reuse else None)
        slot, start = choice.slot, choice.start
        # From here on it is the slot's: whatever fails below ends it, and does not lose it.
        slot.generation, slot.num_dispatched, slot.last_used = generation, 0, next(self._admitted)
        self._queue.popleft()
        if choice.source is not slot:
            self._state = run.copy_row(self._take_state(), choice.source.row, slot.row)
        slot.cached = choice.source.cached[:start]
        params = sampling.make_params(
            seed=request.parameters.seed,
            temperature=request.parameters.temperature,
            top_k=request.parameters.top_k,
            top_p=request.parameters.top_p,
            repetition_penalty=request.parameters.repetition_penalty,
            frequency_penalty=request.parameters.frequency_penalty,
            presence_penalty=request.parameters.presence_penalty,
        )
        new = make_admission(
            params,
            prompt,
            run.config.vocab_size,
            limit=max(1, request.parameters.max_tokens),
            stop_token=generation.stop_token,
            wants_logprobs=request.parameters.logprobs is not None,
            start=start,
        )
        self._state = run.admit(self._take_state(), slot.row, new)
        generation.begin(start)
        self.counts.prompt_tokens += len(prompt)
        self.counts.reused_tokens += start
        chunks = collections.deque(run.chunks(len(prompt), start))
        return _PrefillInProgress(slot, generation, chunks)

    def _read_chunk(self, reading: _PrefillInProgress) -> None:
        """Read one chunk of a prompt."""
        slot, generation, run = reading.slot, reading.generation, self.executor
        prompt, scored = generation.prompt, generation.request.parameters.prompt_logprobs
        start, size = reading.chunks.popleft()
        args = (self._take_state(), slot.row, prompt, start, size)
        last = not reading.chunks
        columns = [(slot, generation, 0)] if last else []
        if scored:
            self._state, drawn, logprobs = run.prefill_scored(*args)
            targets = prompt[start + 1 : start + size + 1]
            dispatched = _InFlight(drawn, columns, (generation, logprobs, targets))
        else:
            self._state, drawn = run.prefill_chunk(*args)
            dispatched = _InFlight(drawn, columns)
        # Read with scores, tokens may have other bits than those of a prompt that is only read.
        slot.cached = prompt[: start + size] if run.plan.batch_invariant or not scored else []
        if last:
            slot.num_dispatched, self._reading = 1, None
        if columns or scored:
            self._push(dispatched)

    def _draw(self) -> None:
        """Draw the next tokens of all answers; read what is ready."""
        active = [
            slot
            for slot in self._slots
            if slot.generation
            and 0 < slot.num_dispatched < slot.generation.request.parameters.max_tokens
        ]
        if active:
            longest = max(slot.position for slot in active)
            rows = [slot.row for slot in active]
            self._state, drawn, computed = self.executor.decode(self._take_state(), rows, longest)
            columns = [(s, s.generation, computed.index(s.row)) for s in active if s.generation]
            for slot in active:
                slot.num_dispatched += self.executor.plan.decode_steps
            self._push(_InFlight(drawn, columns))
        else:
            while self._dispatched:
                self._receive(self._dispatched.popleft())

    def _push(self, dispatched: _InFlight) -> None:
        """Queue what was dispatched, and read what need not wait any longer."""
        self._dispatched.append(dispatched)
        while len(self._dispatched) >= self.executor.plan.max_in_flight:
            self._receive(self._dispatched.popleft())

    # What the device gave.

    def _receive(self, dispatched: _InFlight) -> None:
        """Wait for tokens, and hand them to their requests."""
        tokens = np.asarray(dispatched.drawn.tokens)
        self._tick()
        if dispatched.prompt_logprobs is not None:
            generation, logprobs, targets = dispatched.prompt_logprobs
            count = generation.request.parameters.logprobs or 0
            if not generation.done:
                generation.push_prompt_logprobs(token_logprobs(logprobs, 0, targets, count))
        for slot, generation, column in dispatched.columns:
            if generation.done:
                continue
            try:
                mine = [token for token in tokens[:, column].tolist() if token != NO_TOKEN]
                self._hand_over(generation, mine, dispatched.drawn.logprobs, column)
                if not generation.done:
                    generation.changed()
            except Exception as error:  # whatever it is, the others go on
                self._fail(generation, error)
            if generation.done:
                self._free(slot)

    def _hand_over(
        self, generation: Generation, tokens: list[int], logprobs: Logprobs, column: int
    ) -> None:
        request = generation.request
        if request.parameters.max_tokens == 0:  # there is a token only because one was to be scored
            return self._end(generation, "length")
        scores: Sequence[Any] = [None] * len(tokens)
        if request.parameters.logprobs is not None:
            scores = token_logprobs(logprobs, column, tokens, request.parameters.logprobs)
        for token, logprob in zip(tokens, scores, strict=True):
            self.counts.tokens += 1
            generation.push(token, logprob)
            if generation.done:
                self._count_result(generation)
                break
        return None

    def _free(self, slot: Slot) -> None:
        """Let another request have a slot."""
        generation, slot.generation = slot.generation, None
        assert generation is not None
        if self._reading is not None and self._reading.slot is slot:
            self._reading = None
        if self.executor.plan.batch_invariant and slot.num_dispatched:
            # Else tokens read one by one have other bits than those of a prompt.
            slot.cached = [*generation.prompt, *generation.tokens[:-1]]
        if generation.result is None or generation.result.finish_reason != "length":
            # The device does not know yet, unless EOS told it.
            self._state = self.executor.release(self._take_state(), slot.row)

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        try:
            generation.finish(reason)
            self._count_result(generation)
        except Exception as error:
            self._fail(generation, error)

    def _fail(self, generation: Generation, error: BaseException) -> None:
        generation.fail(error)
        self._count("error")

    def _count_result(self, generation: Generation) -> None:
        assert generation.result is not None
        self._count(generation.result.finish_reason)

    def _count(self, ending: str) -> None:
        self.counts.ended[ending] = self.counts.ended.get(ending, 0) + 1

    def _give_up(self, error: BaseException) -> None:
        """End all requests in slots by an error, and begin anew with what is in the queue."""
        self._state, self._reading = None, None
        self._dispatched.clear()
        for slot in self._slots:
            if slot.generation is not None and not slot.generation.done:
                self._fail(slot.generation, error)
            slot.generation, slot.cached = None, []
        if self._queue and self._queue[0].done:  # interrupted just as it got its slot
            self._queue.popleft()

    def _take_state(self) -> DecodeState:
        """Return the state to hand over to a program, which consumes it."""
        state, self._state = self._state, None
        return self.executor.init_state() if state is None else state

    def _tick(self) -> None:
        """Bring the clock up to now."""
        began, compiled = self._turn_began
        now, compiled_now = time.perf_counter(), self.executor.compiled.seconds
        self._clock.compiled_s += compiled_now - compiled
        self._clock.worked_s += now - began - (compiled_now - compiled)
        self._turn_began = (now, compiled_now)
