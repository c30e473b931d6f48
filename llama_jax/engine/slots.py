"""Slots: the engine's side of the decode state's slots, and what their caches still hold."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.decode.needs import ALL_NEEDS, Needs
from llama_jax.engine.generation import Generation


@dataclasses.dataclass
class Slot:
    """One slot of the decode state."""

    index: int
    replica: int = 0
    """The replica of the model that has it."""
    generation: Generation | None = None
    """None: the slot is free."""
    cached: list[int] = dataclasses.field(default_factory=list)
    """The tokens that its cache holds and that a prompt may reuse."""
    needs: Needs = ALL_NEEDS
    """What its generation needs of a sampling step."""
    num_dispatched: int = 0
    """Tokens of its generation that were dispatched, those it continues included; 0 while the
    prompt is being read."""
    is_dirty: bool = False
    """Its cache may hold numbers of drafts that are not finite: nothing more is drafted for it."""
    last_used: int = 0
    """When it was last assigned, counted in generations."""

    @property
    def position(self) -> int:
        """The cache position of the last token that was dispatched."""
        assert self.generation is not None
        return len(self.generation.prompt) + self.num_dispatched - 1

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is read, and tokens are left to dispatch."""
        if self.generation is None:
            return False
        return 0 < self.num_dispatched < self.generation.max_tokens

    def common_prefix_len(self, prompt: list[int]) -> int:
        """Return how many of a prompt's first tokens its cache holds."""
        low, high = 0, min(len(self.cached), len(prompt))
        while low < high:  # by halves: lists are compared much faster than item by item
            middle = (low + high + 1) // 2
            if self.cached[low:middle] == prompt[low:middle]:
                low = middle
            else:
                high = middle - 1
        return low


class Placement(NamedTuple):
    """Where a prompt goes."""

    slot: Slot
    """A free one."""
    source: Slot
    """The slot whose cache holds the prompt's beginning; `slot` itself if nothing is copied."""
    start: int
    """How many tokens that is."""


def assign_slot(
    slots: Sequence[Slot], prompt: list[int], multiple: int | None, chunk: int
) -> Placement:
    """Choose a slot for a prompt; one must be free.

    Of several replicas that one is chosen where most whole chunks need not be read, then the one
    with the fewest slots in use, then the one that holds more of the prompt's beginning.

    Args:
        slots: all of them.
        prompt: its tokens.
        multiple: the beginning is reused in multiples of so many tokens; None: not at all.
        chunk: tokens that a turn reads.
    """

    def rank(own: Sequence[Slot]) -> tuple[tuple[int, int, int], Placement]:
        placement = _assign(own, prompt, multiple)
        in_use = sum(slot.generation is not None for slot in own)
        return (placement.start // chunk, -in_use, placement.start), placement

    by_replica: dict[int, list[Slot]] = {}
    for slot in slots:
        by_replica.setdefault(slot.replica, []).append(slot)
    with_room = [own for own in by_replica.values() if any(s.generation is None for s in own)]
    return max(map(rank, with_room), key=lambda ranked: ranked[0])[1]


def _assign(slots: Sequence[Slot], prompt: list[int], multiple: int | None) -> Placement:
    """Choose a slot of one replica, of which one is free.

    A free slot that holds the prompt's beginning is used itself if little else would be lost.
    Otherwise its content is copied to the slot that was assigned longest ago.
    """
    free = [slot for slot in slots if slot.generation is None]
    oldest = min(free, key=lambda slot: slot.last_used)
    if multiple is None:
        return Placement(oldest, oldest, 0)
    # Of equals a free one: from that, nothing need be copied.
    held = {slot.index: slot.common_prefix_len(prompt) for slot in slots}
    best = max(slots, key=lambda slot: (held[slot.index], slot.generation is None))
    common = min(held[best.index], len(prompt) - 1)  # one is read at least, for its logits
    start = common - common % multiple
    if start == 0:
        return Placement(oldest, oldest, 0)
    in_place = best.generation is None and len(best.cached) <= 2 * start
    return Placement(best if in_place else oldest, best, start)
