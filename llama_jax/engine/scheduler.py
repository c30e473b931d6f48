"""Scheduler: what each turn does. Which prompts are read, which slots decode, who gets the tokens.

A turn runs some decode steps of every answer, and then reads a bounded piece of the next prompts,
so that a long one does not hold up the answers in flight. `Bursts` says how many steps, `Prefills`
in which order prompts are read, so that a long one does not hold up short ones either. Decoding is
first, so that a turn ends once first tokens are there: whoever works it need not wait for the next.
"""

from llama_jax.decode.executor import Executor
from llama_jax.decode.sampling import NOT_FINITE
from llama_jax.engine.bursts import Bursts
from llama_jax.engine.clock import Clock
from llama_jax.engine.counts import Counts
from llama_jax.engine.delivery import NotFiniteError, hand_over, tokens_of
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.generation import Generation
from llama_jax.engine.pipeline import Column, InFlight, Pipeline
from llama_jax.engine.prompts import Prompts
from llama_jax.engine.result import FinishReason
from llama_jax.engine.slots import Slot
from llama_jax.engine.speculation import Speculation
from llama_jax.engine.waiting import Waiting


class Scheduler:
    """Decide and do one turn of work at a time; not thread-safe.

    Args:
        executor: its batch is the number of slots.
        waiting: requests without a slot; those that get one or end are taken out.
        clock: brought up to now before tokens are handed over.
        reuse: let prompts reuse what slots hold.
        drafter: what proposes tokens, if the executor's plan speculates.
    """

    def __init__(
        self,
        executor: Executor,
        waiting: Waiting,
        clock: Clock,
        *,
        reuse: bool,
        drafter: Drafter | None,
    ):
        self.counts = Counts()
        self.failures = 0
        """Failed turns since a request last ended well: a device that is gone fails every one."""
        self.pipeline = Pipeline(executor)
        sizes = executor.sizes
        self.slots = [Slot(i, sizes.replica_of(i)) for i in range(executor.batch)]
        self._executor, self._waiting, self._clock = executor, waiting, clock
        self._prompts = Prompts(
            executor, self.pipeline, self.slots, waiting, self.counts, reuse=reuse
        )
        self._bursts = Bursts(executor, clock)
        self._speculation = drafter and Speculation(executor, drafter, clock, self.counts)

    @property
    def running(self) -> int:
        """Slots that live requests use; work in the background gives its own up for them."""
        return len(self._in_slots) - self.running_background

    @property
    def running_background(self) -> int:
        """Slots that work in the background uses."""
        return sum(generation.background for generation in self._in_slots)

    @property
    def _in_slots(self) -> list[Generation]:
        return [slot.generation for slot in self.slots if slot.generation is not None]

    def turn(self) -> bool:
        """Do one turn; return whether there is more to do."""
        self._end_early()
        self._decode()
        self._make_room()
        self._read_prompts()
        return bool(self._waiting or not self.pipeline.is_empty or self._in_slots)

    def fail_all(self, error: BaseException) -> None:
        """End all requests in slots by an error; the queue stays."""
        self.failures += 1
        self._prompts.clear()
        self.pipeline.reset()
        if self._speculation is not None:
            self._speculation.reset()
        for slot in self.slots:
            if slot.generation is not None and not slot.generation.done:
                self._fail(slot.generation, error)
            slot.generation, slot.cached = None, []
        for generation in self._waiting:
            if generation.done:  # interrupted just as it got its slot
                self._waiting.remove(generation)

    def fail_queue(self, error: BaseException) -> None:
        """End all requests that wait by an error."""
        for generation in self._waiting:
            self._waiting.remove(generation)
            self._fail(generation, error)

    # Prompts.

    def _end_early(self) -> None:
        """End what was cancelled, and what requests no token: that needs no slot."""
        for generation in [g for g in self._waiting if g.cancelled or g.is_empty]:
            self._waiting.remove(generation)
            self._end(generation, "cancelled" if generation.cancelled else "length")
        for slot in self.slots:
            if slot.generation is not None and slot.generation.cancelled:
                self._end(slot.generation, "cancelled")
                self._free(slot)

    def _make_room(self) -> None:
        """Take slots from work in the background for live requests."""
        if not self._waiting.preempted(self.slots):
            return
        while not self.pipeline.is_empty:  # what is in flight would come once it has another slot
            self._receive()
        for slot in self._waiting.preempted(self.slots):
            assert slot.generation is not None
            self._waiting.put_back(slot.generation)  # first: a failure below does not lose it
            self._free(slot)

    def _read_prompts(self) -> None:
        """Read the next prompts, as much as a turn may.

        The chunks of several replicas are read at the same time: results are awaited after each
        has got one.
        """
        budgets = self._prompts.budgets()
        while budgets:
            budgets = self._prompts.read(budgets)
            self._receive_ready()

    # Tokens.

    def _decode(self) -> None:
        """Dispatch the next steps of all answers; hand over the results that are due."""
        active = [slot for slot in self.slots if slot.is_decoding]
        if not active:
            while not self.pipeline.is_empty:
                self._receive()
        elif self._speculation is None:
            self._decode_steps(active)
        else:
            self._decode_or_verify(active, self._speculation)

    def _decode_steps(self, active: list[Slot]) -> None:
        count = len(self._executor.sizes.decode_slots([slot.index for slot in active]))
        streamed = any(generation.streamed for generation in self._in_slots)
        steps = self._bursts.begin(count, streamed=streamed)
        self.pipeline.decode(active, steps)
        for slot in active:
            slot.num_dispatched += steps
        if (results := self._receive_ready()) is not None:
            self._bursts.end(results.tokens)

    def _decode_or_verify(self, active: list[Slot], speculation: Speculation) -> None:
        """Dispatch the next steps of all answers, or a pass over drafts of them."""
        window = speculation.choose(active)
        if window is None:
            self._decode_steps(active)
        else:
            self.pipeline.verify(active, window)
            self._receive_ready()
        assert self.pipeline.is_empty, "drafts are made from tokens that were read"
        speculation.end(self._bursts.ran)
        for slot in active:
            if slot.generation is not None:
                slot.num_dispatched = len(slot.generation.tokens)

    def _receive_ready(self) -> InFlight | None:
        """Hand over results until no more than the plan allows are in flight; return the last."""
        results = None
        while self.pipeline.is_full:
            results = self._receive()
        return results

    def _receive(self) -> InFlight:
        """Wait for the oldest results, and hand them to their requests; return them."""
        results = self.pipeline.receive()
        self._clock.update()
        if (scores := results.prompt_scores) is not None and not scores.generation.done:
            scores.hand_over()
        for column in results.columns:
            generation = column.generation
            if generation.done:
                continue
            try:
                self._hand_over(column, results)
                if not generation.done:
                    generation.changed()
            except Exception as error:  # whatever it is, the others go on
                self._fail(generation, error)
            if generation.done:
                self._free(column.slot)
        return results

    def _hand_over(self, column: Column, results: InFlight) -> None:
        """Give a generation its next tokens, up to the one that ends it."""
        generation, own = column.generation, tokens_of(column, results)
        if generation.max_tokens == 0 and NOT_FINITE not in own:
            return self._end(generation, "length")  # its prompt was scored, which draws a token
        if self._speculation is not None:
            self._speculation.observe(generation, own)
        hand_over(column, results, self.counts)
        if generation.result is not None:
            self.failures = 0
            self.counts.count_end(generation.result.finish_reason)
        return None

    # Ends.

    def _free(self, slot: Slot) -> None:
        """Make a slot available to the next request."""
        generation, slot.generation = slot.generation, None
        assert generation is not None
        self._prompts.remove(slot, generation)
        if slot.is_dirty or isinstance(generation.error, NotFiniteError):
            self.pipeline.clear_slot(slot)
            slot.cached, slot.is_dirty = [], False
        elif self._executor.plan.batch_invariant and slot.num_dispatched:
            # Else tokens read one by one have other bits than those of a prompt.
            slot.cached = [*generation.prompt, *generation.tokens[:-1]]
        if generation.result is None or generation.result.finish_reason != "length":
            # The device does not know of this end, unless it was EOS.
            self.pipeline.release(slot)

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        try:
            generation.finish(reason)
            assert generation.result is not None
            self.counts.count_end(generation.result.finish_reason)
        except Exception as error:
            self._fail(generation, error)

    def _fail(self, generation: Generation, error: BaseException) -> None:
        generation.fail(error)
        self.counts.count_end("error")
