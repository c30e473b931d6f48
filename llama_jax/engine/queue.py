"""Queue: requests that wait for a slot. Clients take turns, so none waits behind another's many."""

import collections
import itertools
import threading
import time
from collections.abc import Collection, Iterator

from llama_jax.engine.generation import Generation
from llama_jax.errors import InputError

ACTIVE_S = 60.0
"""How long a client counts as active after a request."""

KEPT_SHARE = 8
"""One place of this many is kept for clients of which no request waits, see `Queue.kept`."""


def check_max_queue(max_queue: int | None) -> None:
    """Refuse a number of requests that may wait that is none; None: any may."""
    if max_queue is not None and (type(max_queue) is not int or max_queue < 0):
        raise InputError(f"max_queue is {max_queue!r}, expected a whole number from 0")


class Queue:
    """Requests in the order in which they get slots; thread-safe.

    One client's requests keep their order. Among clients the turn goes round: before a client's
    first request, each other client gets at most one slot. With one client it is first come, first
    served.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, collections.deque[Generation]] = {}
        """The client whose turn it is comes first."""
        self._last_request: dict[str, float] = {}
        """When each active client last had one, in rising order."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Generation]:
        """Iterate over those that wait now, client by client."""
        with self._lock:
            waiting = [each for own in self._by_client.values() for each in own]
        return iter(waiting)

    def count(self, client: str) -> int:
        """Return how many requests of a client wait."""
        with self._lock:
            return len(self._by_client.get(client, ()))

    def kept(self, client: str, places: int) -> int:
        """Return how many places of the queue a client may not take.

        If one of its requests waits and another client was active in the last ACTIVE_S, it leaves
        the last eighth to others: whoever has many requests refuses none with a single one.
        """
        with self._lock:
            alone = client not in self._by_client or self._num_active([client]) <= 1
            return 0 if alone else places // KEPT_SHARE

    def append(self, generation: Generation) -> None:
        """Add a client's request behind its others."""
        with self._lock:
            own = self._by_client.setdefault(generation.client, collections.deque())
            own.append(generation)
            self._last_request.pop(generation.client, None)
            self._last_request[generation.client] = time.monotonic()

    def next(self, free: int, holders: Collection[str]) -> list[Generation]:
        """Return the requests that free slots are for, in the order in which they get them.

        Each client's first comes in turn, then each one's second. The last free slot is kept for a
        client that has none, if another was active in the last ACTIVE_S: it need not wait for an
        answer to end. Nor does a client then get more slots than its requests' `max_slots`.

        Args:
            free: how many slots are free.
            holders: the client that has each of the other slots.
        """
        with self._lock:
            rounds = itertools.zip_longest(*self._by_client.values())
            waiting = (each for round_ in rounds for each in round_ if each is not None)
            if self._num_active(holders) <= 1:
                return list(itertools.islice(waiting, free))
            chosen, held = [], collections.Counter(holders)
            for each in waiting:
                own = held[each.client]
                is_over = each.max_slots is not None and own >= each.max_slots
                if len(chosen) + bool(own) < free and not is_over:
                    chosen.append(each)
                    held[each.client] += 1
            return chosen

    def take(self, generation: Generation) -> None:
        """Take out one of the `next`, which gets a slot: its client's turn comes after the others'.

        Of the `next`, each client's first stays among them, however many others are taken.
        """
        with self._lock:
            later = dict(self._by_client)
            own = collections.deque(later.pop(generation.client))
            own.remove(generation)
            if own:
                later[generation.client] = own
            self._by_client = later  # in one step: an interrupt loses no request

    def remove(self, generation: Generation) -> None:
        """Take out a request that ends without a slot; its client keeps its turn."""
        with self._lock:
            own = self._by_client[generation.client]
            own.remove(generation)
            if not own:
                del self._by_client[generation.client]

    def _num_active(self, holders: Collection[str]) -> int:
        """Return how many clients have requests, or had one lately."""
        since = time.monotonic() - ACTIVE_S
        while self._last_request and next(iter(self._last_request.values())) < since:
            del self._last_request[next(iter(self._last_request))]
        return len({*self._last_request, *self._by_client, *holders})
