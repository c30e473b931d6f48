"""Prompts: which are read next, into which slots, a chunk at a time.

What a slot's cache holds stays there when its request has ended: a prompt that begins with the same
tokens need not read them again (a prefix cache hit). The tokens are the same either way.
"""

import itertools
from collections.abc import Sequence

from llama_jax.decode.executor import Executor
from llama_jax.engine.admission import admission_of
from llama_jax.engine.counts import Counts
from llama_jax.engine.generation import Generation
from llama_jax.engine.pipeline import Pipeline
from llama_jax.engine.prefills import Prefills
from llama_jax.engine.slots import Placement, Slot, assign_slot
from llama_jax.engine.waiting import Waiting


class Prompts:
    """Give slots to requests, and read their prompts; not thread-safe.

    Args:
        executor: what reads them.
        pipeline: of the executor; gets the results.
        slots: all of them.
        waiting: requests without a slot; those that get one are taken out.
        counts: the engine's.
        reuse: let prompts reuse what slots hold.
    """

    def __init__(
        self,
        executor: Executor,
        pipeline: Pipeline,
        slots: Sequence[Slot],
        waiting: Waiting,
        counts: Counts,
        *,
        reuse: bool,
    ):
        self._executor, self._pipeline, self._slots = executor, pipeline, slots
        self._waiting, self._counts, self._reuse = waiting, counts, reuse
        self._prefills = [Prefills() for _ in range(executor.sizes.replicas)]
        self._admitted = itertools.count(1)

    def budgets(self) -> dict[int, int]:
        """Return how many tokens a turn reads in each replica: as many as the largest chunk has."""
        return dict.fromkeys(range(len(self._prefills)), self._executor.plan.prefill_sizes[-1])

    def read(self, budgets: dict[int, int]) -> dict[int, int]:
        """Read the next chunk of each replica; return what is left of their budgets.

        Those in which no chunk has room, or none is due, are left out.
        """
        left = {}
        for replica, budget in budgets.items():
            read = self._read_next(replica, budget)
            if read is not None and budget - read >= self._executor.plan.prefill_sizes[0]:
                left[replica] = budget - read
        return left

    def remove(self, slot: Slot, generation: Generation) -> None:
        """Drop a prompt, if it is being read."""
        self._prefills[slot.replica].remove(generation)

    def clear(self) -> None:
        """Drop all that are being read."""
        for prefills in self._prefills:
            prefills.clear()

    def _read_next(self, replica: int, budget: int) -> int | None:
        """Read the next chunk of a replica's prompts.

        Returns:
            Its size; None: there is none, or it is larger than the budget.
        """
        prefills, waiting = self._prefills[replica], self._waiting.admissible(self._slots)
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
        return assign_slot(self._slots, generation.prefix, multiple, plan.prefill_sizes[-1])

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
            self._pipeline.copy_slot(source, slot)
        slot.cached = source.cached[:start]
        new, slot.needs = admission_of(generation, start, self._executor.config.vocab_size)
        self._pipeline.admit(slot, new)
        if not goes_on:
            generation.begin(start)
            self._counts.prompt_tokens += len(prefix)
            self._counts.cached_tokens += start
        chunks = self._executor.sizes.chunks(len(prefix), start)
        self._prefills[slot.replica].add(slot, generation, chunks)

    def _read_chunk(self, slot: Slot, generation: Generation, start: int, size: int) -> None:
        """Read the next chunk of a prompt."""
        self._pipeline.prefill_chunk(slot, generation, start, size)
        # Read with scores, tokens may have other bits than those of a prompt that is only read.
        scored = generation.request.parameters.prompt_logprobs
        reusable = self._executor.plan.batch_invariant or not scored
        slot.cached = generation.prefix[: start + size] if reusable else []
        if self._prefills[slot.replica].take(generation):
            slot.num_dispatched = len(generation.tokens) + 1
