"""Waiting: the live requests and the background work that wait, and which of them get slots.

Background work has the slots that no live request needs. When one needs a slot, the work gives its
own up at the next turn, keeps the tokens that it has, and goes on from them later: what it holds is
in the slot's prefix cache until another prompt takes its place, and is read again after that.
"""

import collections
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence

from llama_jax.engine.generation import Generation
from llama_jax.engine.queue import Queue
from llama_jax.engine.slots import Slot

MAX_PREEMPTIONS = 2
"""Times in a row that work loses its slot before it has drawn a token: it then keeps the next until
it has, so that it comes to an end however often others need slots."""


class Waiting:
    """The requests without a slot; thread-safe.

    Args:
        live: the queue of live requests, which come first.
    """

    def __init__(self, live: Queue):
        self._live = live
        self._background: collections.deque[Generation] = collections.deque()
        self._tokens: weakref.WeakKeyDictionary[Generation, int] = weakref.WeakKeyDictionary()
        """Of background work that had a slot: how many tokens it had when it got the last."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._live) + self.num_background

    def __iter__(self) -> Iterator[Generation]:
        """Iterate over those that wait now, live ones first."""
        with self._lock:
            background = list(self._background)
        return itertools.chain(self._live, background)

    @property
    def num_background(self) -> int:
        """Background work without a slot."""
        return len(self._background)

    def append(self, generation: Generation) -> None:
        """Add background work behind the others; `Queue.append` adds a live request."""
        with self._lock:
            self._background.append(generation)

    def take(self, generation: Generation) -> None:
        """Take out one that gets a slot; see `Queue.take`."""
        if not generation.background:
            return self._live.take(generation)
        with self._lock:
            self._background.remove(generation)
            self._tokens[generation] = len(generation.tokens)
        return None

    def remove(self, generation: Generation) -> None:
        """Take out one that ends without a slot."""
        if not generation.background:
            return self._live.remove(generation)
        with self._lock:
            self._background.remove(generation)
        return None

    def put_back(self, generation: Generation) -> None:
        """Let background work that gives its slot up wait in front of the rest."""
        drawn = len(generation.tokens) > self._tokens[generation]
        generation.preemptions = 0 if drawn else generation.preemptions + 1
        generation.prefix = [*generation.prompt, *generation.tokens]
        with self._lock:
            self._background.appendleft(generation)

    def had_slot(self, generation: Generation) -> bool:
        """Return whether it goes on from where it gave a slot up."""
        return generation in self._tokens

    def admissible(self, slots: Sequence[Slot]) -> list[Generation]:
        """Return those that a slot is free for, live ones first."""
        live, free = self._next_live(slots), sum(slot.generation is None for slot in slots)
        with self._lock:
            background = list(itertools.islice(self._background, max(0, free - len(live))))
        return [*live[:free], *background]

    def preempted(self, slots: Sequence[Slot]) -> list[Slot]:
        """Return the slots that background work is to give up for live requests.

        Those with the fewest tokens first: they are read again the soonest.
        """
        free = sum(slot.generation is None for slot in slots)
        missing = len(self._next_live(slots)) - free
        if missing <= 0:
            return []
        given = [(slot.generation, slot) for slot in slots if slot.generation is not None]
        given = [(work, slot) for work, slot in given if self._yields(work)]
        given.sort(key=lambda pair: len(pair[0].prompt) + len(pair[0].tokens))
        return [slot for _, slot in given[:missing]]

    def _next_live(self, slots: Sequence[Slot]) -> list[Generation]:
        """Return the live requests that get a slot if background work gives up its own."""
        holders = [
            slot.generation.client
            for slot in slots
            if slot.generation is not None and not slot.generation.background
        ]
        return self._live.next(len(slots) - len(holders), holders)

    def _yields(self, generation: Generation) -> bool:
        """Return whether it gives its slot up."""
        if not generation.background or generation.request.parameters.prompt_logprobs:
            return False  # a prompt that is scored is read once: its scores are in order
        drawn = len(generation.tokens) > self._tokens[generation]
        return drawn or generation.preemptions < MAX_PREEMPTIONS
