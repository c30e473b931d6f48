"""Scheduler: what each turn does. Which prompts are read, which slots decode, who gets the tokens.

A turn reads a bounded piece of the next prompts, so that a long one does not hold up the answers in
flight, and then runs some decode steps of every answer. `Prefills` says in which order prompts are
read, so that a long one does not hold up short ones either.

What a slot's cache holds stays there when its request has ended: a prompt that begins with the same
tokens need not read them again (a prefix cache hit). The tokens are the same either way.
"""

import itertools

from llama_jax.decode.executor import Executor
from llama_jax.decode.sampling import NOT_FINITE
from llama_jax.engine.admission import admission_of
from llama_jax.engine.clock import Clock
from llama_jax.engine.counts import Counts
from llama_jax.engine.delivery import NotFiniteError, hand_over, tokens_of
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.generation import Generation
from llama_jax.engine.pipeline import Column, InFlight, Pipeline
from llama_jax.engine.prefills import Prefills
from llama_jax.engine.result import FinishReason
from llama_jax.engine.slots import Placement, Slot, assign_slot
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
        self._executor, self._waiting, self._clock, self._reuse = executor, waiting, clock, reuse
        self._prefills = [Prefills() for _ in range(sizes.replicas)]
        self._admitted = itertools.count(1)
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
        self._make_room()
        self._read_prompts()
        self._decode()
        return bool(self._waiting or not self.pipeline.is_empty or self._in_slots)

    def fail_all(self, error: BaseException) -> None:
        """End all requests in slots by an error; the queue stays."""
        self.failures += 1
        for prefills in self._prefills:
            prefills.clear()
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
        """Read as many tokens of the next prompts as the largest chunk has, in each replica.

        The chunks of several replicas are read at the same time: results are awaited after each
        has got one.
        """
        budgets = dict.fromkeys(range(len(self._prefills)), self._executor.plan.prefill_sizes[-1])
        while budgets:
            for replica, budget in list(budgets.items()):
                read = self._read_next(replica, budget)
                if read is None or budget - read < self._executor.plan.prefill_sizes[0]:
                    del budgets[replica]
                else:
                    budgets[replica] -= read
            self._receive_ready()

    def _read_next(self, replica: int, budget: int) -> int | None:
        """Read the next chunk of a replica's prompts.

        Returns:
            Its size; None: there is none, or it is larger than the budget.
        """
        prefills, waiting = self._prefills[replica], self._waiting.admissible(self.slots)
        while (generation := prefills.next(waiting)) is not None:
            if generation not in prefills:
                placement = self._place(generation)
                if placement.slot.replica != replica:
                    waiting.remove(generation)
                    continue
                self._admit(generation, placement)
            slot, start, size = prefills.chunk(generation)
            if size > budget:
                return None
            self._read_chunk(slot, generation, start, size)
            return size
        return None

    def _place(self, generation: Generation) -> Placement:
        """Choose a slot for a request."""
        plan = self._executor.plan
        # To be scored, every token of a prompt must be read.
        reuse = self._reuse and not generation.request.parameters.prompt_logprobs
        multiple = plan.reuse_multiple if reuse else None
        return assign_slot(self.slots, generation.prefix, multiple, plan.prefill_sizes[-1])

    def _admit(self, generation: Generation, placement: Placement) -> None:
        """Take a request out of the queue and give it a free slot."""
        prefix = generation.prefix
        slot, source, start = placement
        # From here on it is the slot's: whatever fails below ends it, and does not lose it.
        slot.generation, slot.num_dispatched = generation, 0
        slot.last_used = next(self._admitted)
        goes_on = self._waiting.had_slot(generation)
        self._waiting.take(generation)
        if source is not slot:
            self.pipeline.copy_slot(source, slot)
        slot.cached = source.cached[:start]
        new, slot.needs = admission_of(generation, start, self._executor.config.vocab_size)
        self.pipeline.admit(slot, new)
        if not goes_on:
            generation.begin(start)
            self.counts.prompt_tokens += len(prefix)
            self.counts.cached_tokens += start
        chunks = self._executor.sizes.chunks(len(prefix), start)
        self._prefills[slot.replica].add(slot, generation, chunks)

    def _read_chunk(self, slot: Slot, generation: Generation, start: int, size: int) -> None:
        """Read the next chunk of a prompt."""
        self.pipeline.prefill_chunk(slot, generation, start, size)
        # Read with scores, tokens may have other bits than those of a prompt that is only read.
        scored = generation.request.parameters.prompt_logprobs
        reusable = self._executor.plan.batch_invariant or not scored
        slot.cached = generation.prefix[: start + size] if reusable else []
        if self._prefills[slot.replica].take(generation):
            slot.num_dispatched = len(generation.tokens) + 1

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
        self.pipeline.decode(active)
        for slot in active:
            slot.num_dispatched += self._executor.plan.decode_steps
        self._receive_ready()

    def _decode_or_verify(self, active: list[Slot], speculation: Speculation) -> None:
        """Dispatch the next steps of all answers, or a pass over drafts of them."""
        window = speculation.choose(active)
        if window is None:
            self._decode_steps(active)
        else:
            self.pipeline.verify(active, window)
            self._receive_ready()
        assert self.pipeline.is_empty, "drafts are made from tokens that were read"
        speculation.end()
        for slot in active:
            if slot.generation is not None:
                slot.num_dispatched = len(slot.generation.tokens)

    def _receive_ready(self) -> None:
        """Hand over results until no more than the plan allows are in flight."""
        while self.pipeline.is_full:
            self._receive()

    def _receive(self) -> None:
        """Wait for the oldest results, and hand them to their requests."""
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
        self._prefills[slot.replica].remove(generation)
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
