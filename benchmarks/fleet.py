"""Fleet: many replicas behind routers, as discrete events (simpy).

A replica's turns are those of benchmarks/turns.py. Here it has a prefix cache, which is what its
slots still hold, by the engine's rules. A router knows what it has sent itself, and nothing else.
"""

import dataclasses
import itertools
import random
from collections.abc import Generator, Iterable
from typing import Any, TypeVar, cast

import simpy

from benchmarks.traffic import Conversation, Turn
from benchmarks.turns import Costs, Job, Replica

ROUTINGS = ("random", "least", "prefix", "session")

T = TypeVar("T")
Process = Generator[simpy.Event, Any, T]
"""What simpy runs."""


@dataclasses.dataclass(eq=False)
class Request(Job):
    """A request of a conversation."""

    conversation: int = 0
    shared: int = 0
    """Tokens of the prompt that the turn before has left in a slot."""
    cached: int = 0
    """Those that were found there."""
    sent: float = 0.0
    """When it came to the router; `submitted` is when it came to the replica."""


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


class CachedReplica(Replica):
    """A replica whose slots keep the prompts that they have read.

    Args:
        costs: of a turn's parts.
        slots: of the engine.
    """

    def __init__(self, costs: Costs, slots: int):
        super().__init__(costs, slots)
        self.ended: list[Request] = []
        """Since the caller last took them."""
        self._multiple = max(costs.chunk_s)
        self._last_used = dict.fromkeys(range(slots), 0)
        """When each free slot was last assigned."""
        self._assigned = itertools.count(1)
        self._holder: dict[int, int] = {}
        """The slot that holds a conversation."""
        self._held: dict[int, int] = {}
        """The same the other way."""
        self._slot_of: dict[Request, int] = {}

    def admit(self, job: Job) -> int:
        """Give a slot: that which holds the conversation, or the one assigned longest ago."""
        request = cast(Request, job)
        slot = self._holder.get(request.conversation)
        if slot in self._last_used:
            common = min(request.shared, len(request.prefix) - 1)
            request.cached = common - common % self._multiple
        if slot is None or not request.cached:
            slot = min(self._last_used, key=lambda each: self._last_used[each])
        del self._last_used[slot]
        self._holder.pop(self._held.pop(slot, -1), None)
        self._holder[request.conversation], self._held[slot] = slot, request.conversation
        self._slot_of[request] = slot
        return request.cached

    def release(self, job: Job) -> None:
        """Take the slot from a request that has ended; it holds the prompt until it is assigned."""
        request = cast(Request, job)
        self._last_used[self._slot_of.pop(request)] = next(self._assigned)
        self.ended.append(request)


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


class Fleet:
    """Run conversations until all their requests have ended, or are not to come any more.

    Args:
        costs: of a replica's turns.
        slots: of each replica.
        replicas: how many there are.
        routers: what stands before them.
        traffic: in the order in which it begins.
        seconds: after which no request comes.
        seed: of all that is random but the traffic.
    """

    def __init__(
        self,
        costs: Costs,
        slots: int,
        replicas: int,
        routers: Routers,
        traffic: Iterable[Conversation],
        seconds: float,
        seed: int = 0,
    ):
        self.requests: list[Request] = []
        """All that came."""
        self._seconds, self._request_s = seconds, routers.request_s
        self._environment = environment = simpy.Environment()
        self._done: dict[Request, simpy.Event] = {}
        self._replicas = [CachedReplica(costs, slots) for _ in range(replicas)]
        self._wake: list[simpy.Event | None] = [None] * replicas
        self._source = random.Random(f"{seed} routers")
        self._routers = [
            Router(routers.routing, replicas, slots, f"{seed} {number}")
            for number in range(routers.number)
        ]
        self._cores = [simpy.Resource(environment, routers.cores) for _ in self._routers]
        for index in range(replicas):
            environment.process(self._work(index))
        environment.process(self._begin(traffic))
        environment.run()
        assert not self._done, "requests were lost"

    def _begin(self, traffic: Iterable[Conversation]) -> Process[None]:
        for conversation in traffic:
            yield self._environment.timeout(conversation.began - self._environment.now)
            self._environment.process(self._converse(conversation))

    def _converse(self, conversation: Conversation) -> Process[None]:
        comes = conversation.began
        for turn in conversation.turns:
            if comes >= self._seconds:
                return
            yield self._environment.timeout(max(0.0, comes - self._environment.now))
            comes = (yield from self._ask(conversation.number, turn)) + turn.gap_s

    def _ask(self, conversation: int, turn: Turn) -> Process[float]:
        environment = self._environment
        number = int(self._source.random() * len(self._routers))
        request = Request(0.0, range(turn.prompt), turn.output)
        request.conversation, request.shared = conversation, turn.shared
        request.sent = environment.now
        self.requests.append(request)
        done = self._done[request] = environment.event()
        if self._request_s:
            with self._cores[number].request() as core:
                yield core
                yield environment.timeout(self._request_s)
        request.submitted = environment.now
        index = self._routers[number].choose(conversation)
        self._replicas[index].submit(request)
        if (wake := self._wake[index]) is not None:
            self._wake[index] = None
            wake.succeed()
        yield done
        self._routers[number].end(index)
        return request.ended

    def _work(self, index: int) -> Process[None]:
        environment, replica = self._environment, self._replicas[index]
        while True:
            while not replica.is_busy:
                self._wake[index] = wake = environment.event()
                yield wake
                replica.now = max(replica.now, environment.now)
            replica.turn()
            if replica.now > environment.now:
                yield environment.timeout(replica.now - environment.now)
            for request in replica.ended:
                self._done.pop(request).succeed()
            replica.ended.clear()
