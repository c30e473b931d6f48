"""Sizes: which of a few fixed shapes each call uses. Host arithmetic, without a device.

A prompt is prefilled in chunks of a few sizes. Attention reads a bucket of the cache's positions.
Some or all slots decode together. So a handful of programs serve every request.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

from llama_jax.decode.plan import Plan
from llama_jax.nn import attention

MAX_WINDOW_ROWS = 32
"""Tokens of all slots of a replica that a pass verifies at most, if the engine may choose: beyond
that a pass takes as much longer as it computes more."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of one executor's programs."""

    plan: Plan
    batch: int
    """Slots."""
    context: int
    """Tokens of prompt plus output that a slot can hold."""
    replicas: int = 1
    """Of the model. Each has as many of the slots, one after the other."""

    @property
    def slots_each(self) -> int:
        """Slots of each replica."""
        return self.batch // self.replicas

    def replica_of(self, slot: int) -> int:
        """Return the replica that has a slot."""
        return slot // self.slots_each

    @functools.cached_property
    def capacity(self) -> int:
        """Cache positions of each slot: the context, padded to whole attention blocks.

        With room for a window that begins at the last token.
        """
        # Two blocks at least: XLA compiles a loop of one turn as no loop, to other bits.
        longest = max(self.padded(self.context), self.context + self.plan.draft_tokens)
        blocks = -(-longest // attention.BLOCK)
        return max(2, blocks) * attention.BLOCK

    @functools.cached_property
    def buckets(self) -> list[int]:
        """Every bucket, in rising order."""
        return sorted({self.bucket(length) for length in range(1, self.capacity + 1)})

    @functools.cached_property
    def decode_counts(self) -> list[int]:
        """Every number of slots that one decode program computes, in rising order."""
        if not self.plan.batch_invariant:
            return [self.batch]
        each = {self._computed(count) for count in range(1, self.slots_each + 1)}
        return [self.replicas * count for count in sorted(each)]

    def padded(self, length: int) -> int:
        """Return the positions that `length` tokens take when prefilled in chunks.

        A prefill size, or a multiple of the largest: a padded chunk never crosses the end.
        """
        for size in self.plan.prefill_sizes:
            if length <= size:
                return size
        return -(-length // self.plan.prefill_sizes[-1]) * self.plan.prefill_sizes[-1]

    def chunks(self, length: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Cut a prompt's tokens from `start` to `length` into chunks: yield (start, size).

        A chunk has the smallest size that holds the rest, and lies at a multiple of its own size,
        so that with its padding it ends within the cache. `start` is a multiple of the plan's
        `reuse_multiple`: unless the plan is batch-invariant, the cuts after it are those of a
        prompt that is read from its beginning.
        """
        while start < length:
            size = max(size for size in self.plan.prefill_sizes if start % size == 0)
            size = min(size, self.padded(length - start))
            yield start, size
            start += size

    def bucket(self, length: int) -> int:
        """Return the cache positions to attend to: two blocks, four, eight ..., or all."""
        if not self.plan.by_bucket:
            return self.capacity
        bucket = 2 * attention.BLOCK
        while bucket < length:
            bucket *= 2
        return min(bucket, self.capacity)

    def windows(self, count: int) -> tuple[int, ...]:
        """Return the windows that a program computes for so many slots, in rising order.

        Where windows and single tokens have the same bits, drafts of many slots are not worth it.
        """
        if not self.plan.batch_invariant:
            return self.plan.windows
        most = MAX_WINDOW_ROWS * self.replicas // count
        return tuple(width for width in self.plan.windows if width <= most)

    def decode_slots(self, slots: Sequence[int]) -> list[int]:
        """Return the slots to compute: all, unless the plan is batch-invariant.

        Then it is these and some others, a power of two in each replica: few programs, not one for
        each number of slots. A replica's come one after the other.
        """
        if not self.plan.batch_invariant:
            return list(range(self.batch))
        by_replica: list[list[int]] = [[] for _ in range(self.replicas)]
        for slot in slots:
            by_replica[self.replica_of(slot)].append(slot)
        count = self._computed(max(map(len, by_replica)))
        return [slot for i, own in enumerate(by_replica) for slot in self._filled(i, own, count)]

    def _computed(self, count: int) -> int:
        """Return how many slots of a replica are computed for so many of it, at least one."""
        return min(self.slots_each, 1 << (count - 1).bit_length())

    def _filled(self, replica: int, slots: list[int], count: int) -> list[int]:
        """Return so many slots of a replica, these among them."""
        first = replica * self.slots_each
        others = (slot for slot in range(first, first + self.slots_each) if slot not in slots)
        slots = [*slots, *itertools.islice(others, count - len(slots))]
        return sorted(slots) if count == self.slots_each else slots
