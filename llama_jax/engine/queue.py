"""Queue: requests that wait for a slot. Clients take turns, so none waits behind another's many."""

import collections
import itertools
import threading
from collections.abc import Iterator

from llama_jax.engine.generation import Generation


class Queue:
    """Requests in the order in which they get slots; thread-safe.

    One client's requests keep their order. Among clients the turn goes round: before a client's
    first request, each other client gets at most one slot. With one client it is first come, first
    served.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, collections.deque[Generation]] = {}
        """The client whose turn it is comes first."""
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

    def append(self, generation: Generation) -> None:
        """Add a client's request behind its others."""
        with self._lock:
            own = self._by_client.setdefault(generation.client, collections.deque())
            own.append(generation)

    @property
    def first(self) -> Generation | None:
        """The request whose turn it is; None: none waits."""
        with self._lock:
            return next((own[0] for own in self._by_client.values()), None)

    def take(self) -> Generation:
        """Take out `first`, which gets a slot: the next client's turn comes."""
        with self._lock:
            (client, own), *others = self._by_client.items()
            later = dict(others)
            if len(own) > 1:
                later[client] = collections.deque(itertools.islice(own, 1, None))
            self._by_client = later  # in one step: an interrupt loses no request
            return own[0]

    def remove(self, generation: Generation) -> None:
        """Take out a request that ends without a slot; its client keeps its turn."""
        with self._lock:
            own = self._by_client[generation.client]
            own.remove(generation)
            if not own:
                del self._by_client[generation.client]
