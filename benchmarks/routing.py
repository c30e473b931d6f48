"""Routing: to which replica a request goes. A router knows what it has sent itself, no more."""

import dataclasses
import random

ROUTINGS = ("random", "least", "prefix", "session")


@dataclasses.dataclass(frozen=True)
class Routers:
    """What stands before the replicas."""

    routing: str = "random"
    """One of ROUTINGS. random; least: fewest requests under way; prefix: where the turn before was,
    unless that has a replica's slots more under way than the least; session: by a hash."""
    number: int = 1
    """Of equal ones; each request comes to a random one."""
    cores: int = 1
    """Of each."""
    request_s: float = 0.0
    """Seconds of a core that a request takes."""


class Least:
    """Numbers of requests under way, and who has the fewest.

    Args:
        replicas: how many there are.
        source: of what decides between equals.
    """

    def __init__(self, replicas: int, source: random.Random):
        self.counts = [0] * replicas
        self._by_count = [list(range(replicas))]
        self._place = list(range(replicas))
        self._fewest = 0
        self._source = source

    @property
    def fewest(self) -> int:
        """The fewest that a replica has."""
        return self._fewest

    def choose(self) -> int:
        """Return one of the replicas that have the fewest, at random."""
        equals = self._by_count[self._fewest]
        return equals[int(self._source.random() * len(equals))]

    def add(self, replica: int, change: int) -> None:
        """Count one more (1) or one less (-1)."""
        equals, place = self._by_count[self.counts[replica]], self._place[replica]
        equals[place] = equals[-1]
        self._place[equals[place]] = place
        equals.pop()
        self.counts[replica] += change
        count = self.counts[replica]
        if count == len(self._by_count):
            self._by_count.append([])
        self._place[replica] = len(self._by_count[count])
        self._by_count[count].append(replica)
        self._fewest = min(self._fewest, count)
        while not self._by_count[self._fewest]:
            self._fewest += 1


class Router:
    """Where requests go.

    Args:
        routing: one of ROUTINGS.
        replicas: how many there are.
        slots: of each.
        seed: of all that is random.
    """

    def __init__(self, routing: str, replicas: int, slots: int, seed: str):
        assert routing in ROUTINGS, routing
        self._routing, self._replicas, self._slots = routing, replicas, slots
        self._source = random.Random(seed)
        self._least = Least(replicas, self._source)
        self._last: dict[int, int] = {}
        """Where the turn before of a conversation went."""

    @property
    def under_way(self) -> int:
        """Requests that it has sent and that have not ended."""
        return sum(self._least.counts)

    def choose(self, conversation: int) -> int:
        """Return the replica for a request, which is counted there."""
        replica = self._choose(conversation)
        self._least.add(replica, 1)
        if self._routing == "prefix":
            self._last[conversation] = replica
        return replica

    def end(self, replica: int) -> None:
        """Count the end of a request."""
        self._least.add(replica, -1)

    def _choose(self, conversation: int) -> int:
        if self._routing == "random":
            return int(self._source.random() * self._replicas)
        if self._routing == "session":  # every router computes the same
            return int(random.Random(conversation).random() * self._replicas)
        last, least = self._last.get(conversation), self._least
        if last is None or least.counts[last] > least.fewest + self._slots:
            return least.choose()
        return last
