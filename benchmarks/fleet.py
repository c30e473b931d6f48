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

from benchmarks.routing import Router, Routers
from benchmarks.traffic import Conversation, Turn
from benchmarks.turns import Costs, Job, Replica

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
        self._free = set(range(slots))
        self._last_used = [0] * slots
        """When each slot was last assigned."""
        self._assigned = itertools.count(1)
        self._holder: dict[int, int] = {}
        """The slot that holds a conversation."""
        self._held: dict[int, tuple[int, int]] = {}
        """The conversation that a slot holds, and how many tokens of it."""
        self._slot_of: dict[Request, int] = {}

    def admit(self, job: Job) -> int:
        """Give a slot: that which holds the conversation, or the one assigned longest ago."""
        request = cast(Request, job)
        slot = self._holder.get(request.conversation)
        if slot in self._free:
            # Other replicas may have had turns since: then it holds fewer than the turn before.
            common = min(request.shared, self._held[slot][1], len(request.prefix) - 1)
            request.cached = common - common % self._multiple
        if slot is None or not request.cached:
            slot = min(self._free, key=lambda each: (self._last_used[each], each))
        self._free.remove(slot)
        self._last_used[slot] = next(self._assigned)
        held, _ = self._held.get(slot, (-1, 0))
        if self._holder.get(held) == slot:  # unless a later turn of it is in another slot
            del self._holder[held]
        self._holder[request.conversation] = slot
        self._held[slot] = request.conversation, len(request.prefix)
        self._slot_of[request] = slot
        return request.cached

    def release(self, job: Job) -> None:
        """Take the slot from a request that has ended; it holds the prompt until it is assigned."""
        request = cast(Request, job)
        self._free.add(self._slot_of.pop(request))
        self.ended.append(request)


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
        assert not any(router.under_way for router in self._routers), "a router lost count"

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
