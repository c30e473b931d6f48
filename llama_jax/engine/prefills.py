"""Prefills: the prompts that are being read into slots, and whose chunk comes next."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from llama_jax.engine.generation import Generation
from llama_jax.engine.slots import Slot


@dataclasses.dataclass
class PrefillInProgress:
    """A prompt on its way into a slot."""

    slot: Slot
    generation: Generation
    chunks: collections.deque[tuple[int, int]]
    """Those not read yet: (start, size)."""


class Prefills:
    """Prompts that are read in turns, a chunk at a time.

    Every second chunk is one of the oldest prompt, so each prompt is read to its end. The chunks
    between are of the prompt with the fewest tokens left, so a short one waits for at most one
    chunk of a longer one before each of its own.
    """

    def __init__(self) -> None:
        self._in_progress: dict[Generation, PrefillInProgress] = {}
        self._is_turn_of_oldest = False

    def __contains__(self, generation: Generation) -> bool:
        """Return whether its prompt has a slot and is not read whole."""
        return generation in self._in_progress

    def next(self, waiting: Sequence[Generation]) -> Generation | None:
        """Return the generation whose prompt is read next; None: there is none.

        Prompts of background work come after all others.

        Args:
            waiting: those that a slot is free for. They get it when their turn comes, not before:
                a prompt then reuses what others with the same beginning have read.
        """
        prompts = [*self._in_progress, *waiting]
        prompts = [each for each in prompts if not each.background] or prompts
        if self._is_turn_of_oldest:
            return min(prompts, key=lambda each: each.submitted, default=None)
        return min(prompts, key=self._unread, default=None)

    def add(self, slot: Slot, generation: Generation, chunks: Iterable[tuple[int, int]]) -> None:
        """Add a prompt that has got a slot, and its chunks to read: (start, size)."""
        left = collections.deque(chunks)
        self._in_progress[generation] = PrefillInProgress(slot, generation, left)

    def chunk(self, generation: Generation) -> tuple[Slot, int, int]:
        """Return the slot, start and size of a prompt's next chunk."""
        prefill = self._in_progress[generation]
        return prefill.slot, *prefill.chunks[0]

    def take(self, generation: Generation) -> bool:
        """Count a prompt's next chunk as read; return whether it was the last."""
        self._is_turn_of_oldest = not self._is_turn_of_oldest
        chunks = self._in_progress[generation].chunks
        chunks.popleft()
        if not chunks:
            del self._in_progress[generation]
        return not chunks

    def remove(self, generation: Generation) -> None:
        """Drop a prompt, if it is being read."""
        self._in_progress.pop(generation, None)

    def clear(self) -> None:
        """Drop all prompts."""
        self._in_progress.clear()

    def _unread(self, generation: Generation) -> int:
        """Return how many tokens of its prompt are not read yet."""
        prefill = self._in_progress.get(generation)
        return len(generation.prefix) - (prefill.chunks[0][0] if prefill else 0)
