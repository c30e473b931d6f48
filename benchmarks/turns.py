"""Turns: how the engine's turns go, from the seconds that chunks and decode steps take. Arithmetic.

The rules are the scheduler's: a turn reads at most as many prompt tokens as the largest chunk has,
then runs `decode_steps` steps of every answer. What reads prompts in which order is the engine's
own `Prefills`; how they are cut is its own `Sizes.chunks`.
"""

import collections
import dataclasses
import functools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from llama_jax.decode.plan import Plan
from llama_jax.decode.sizes import Sizes
from llama_jax.engine.prefills import Prefills
from llama_jax.nn.kernel_choice import KernelChoice


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of request in a mix."""

    prompt: int
    """Tokens to read; 0: all of them are in the prefix cache."""
    output: int
    """Tokens to generate, 1 or more."""
    share: float
    """Of all requests."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the parts of a turn take."""

    chunk_s: Mapping[int, float]
    """Seconds of a chunk of a prompt, by its tokens: all sizes that the plan has."""
    step_s: Mapping[int, float]
    """Seconds of a decode step, by the slots that it computes: those that have a program."""
    request_s: float = 0.0
    """Seconds of each request besides: its admission and first token."""
    decode_steps: int = 8
    """Steps of a turn."""
    in_flight: int = 1
    """Calls that the host sends before it reads the first one's tokens."""

    def chunks(self, prompt: int, start: int = 0) -> list[tuple[int, int]]:
        """Return the (start, size) of a prompt's chunks; one of no tokens if all are read.

        Args:
            prompt: its tokens.
            start: those of its first tokens that need not be read, a multiple of the largest chunk.
        """
        return list(self._sizes.chunks(prompt, start)) or [(start, 0)]

    @functools.cached_property
    def _sizes(self) -> Sizes:
        sizes = tuple(sorted(self.chunk_s))
        plan = Plan("float32", "float32", KernelChoice("plain", "blocks"), sizes)
        return Sizes(plan, 1, max(sizes))

    def step(self, slots: int) -> float:
        """Return the seconds of a step of so many slots: the next larger program is run."""
        return self.step_s[min(n for n in self.step_s if n >= slots)] if slots else 0.0

    def mean_step(self, slots: float) -> float:
        """Return the seconds of a step when so many slots decode on average."""
        low = math.floor(slots)
        return self.step(low) + (slots - low) * (self.step(math.ceil(slots)) - self.step(low))


@dataclasses.dataclass(eq=False)
class Job:
    """One request on its way."""

    submitted: float
    prefix: range
    output: int
    began: float = 0.0
    """When it got a slot."""
    first: float = 0.0
    """When its first token was read."""
    ended: float = 0.0
    num_dispatched: int = 0
    num_received: int = 0
    background: bool = False
    """See `Prefills.next`."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """The most that a number of slots answers of a mix, by a formula."""

    requests_per_s: float
    by: str
    """What binds: prompts (a turn reads no more of them) or slots (all are in use)."""


def formula(costs: Costs, slots: int, mix: Sequence[Kind]) -> Bound:
    """Return the bound of means.

    In each turn `r = min(C / c, S / (t + w))` requests end, `n = r t` slots decode, and it takes
    `r p + K s(n)` seconds; docs/scaling.md names the letters.
    """
    total = sum(kind.share for kind in mix)
    largest = max(costs.chunk_s)
    read = reading = turns = slot_turns = 0.0
    for kind in mix:
        sizes = [size for _, size in costs.chunks(kind.prompt)]
        decode_turns = math.ceil((kind.output - 1) / costs.decode_steps)
        # The turn that reads the last chunk decodes as well.
        others = max(0, math.ceil(sum(sizes) / largest) - 1)
        others += costs.in_flight - 1
        share = kind.share / total
        read += share * sum(sizes)
        reading += share * (costs.request_s + sum(costs.chunk_s[size] for size in sizes if size))
        turns += share * decode_turns
        slot_turns += share * (decode_turns + others)
    by_prompts = largest / read if read else math.inf
    by_slots = slots / slot_turns if slot_turns else math.inf
    ended = min(by_prompts, by_slots)
    by = "prompts" if by_prompts <= by_slots else "slots"
    if math.isinf(ended):  # no prompt and no decode step: requests alone
        return Bound(1 / costs.request_s if costs.request_s else math.inf, by)
    step = costs.decode_steps * costs.mean_step(min(ended * turns, slots))
    return Bound(ended / (ended * reading + step), by)


def draw(mix: Sequence[Kind], number: int, rate: float | None = None, seed: int = 0) -> list[Job]:
    """Return requests of a mix in random order.

    Args:
        mix: the kinds; their numbers are their shares, rounded.
        number: of requests, about.
        rate: they come at random (Poisson) times, so many a second. None: all at once.
        seed: of order and times.
    """
    source = random.Random(seed)
    total = sum(kind.share for kind in mix)
    kinds = [kind for kind in mix for _ in range(round(number * kind.share / total))]
    source.shuffle(kinds)
    jobs, now = [], 0.0
    for kind in kinds:
        now += source.expovariate(rate) if rate else 0.0
        jobs.append(Job(now, range(kind.prompt), kind.output))
    return jobs


class Replica:
    """One engine: what it has to do, and its turns.

    Args:
        costs: of a turn's parts.
        slots: of the engine; at most the largest number in `costs.step_s`.
    """

    def __init__(self, costs: Costs, slots: int):
        self.now = 0.0
        """Seconds, as the host counts them."""
        self.reading_s = self.decoding_s = 0.0
        """What the device spent on prompts and first tokens, and on decode steps."""
        self._costs, self._slots = costs, slots
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._prefills = Prefills()
        self._device = 0.0
        """When the device has done all that was sent."""
        self._in_flight: collections.deque[tuple[float, dict[Job, int]]] = collections.deque()
        """When its results are there, and how many tokens whose."""

    @property
    def is_busy(self) -> bool:
        """Whether requests wait or run."""
        return bool(self._waiting or self._running)

    def submit(self, job: Job) -> None:
        """Add a request to the queue."""
        self._waiting.append(job)

    def admit(self, job: Job) -> int:
        """Give a request a slot; return how many of its prompt's first tokens are not read again.

        Where a prefix cache is to be computed, a subclass does it.
        """
        return 0

    def release(self, job: Job) -> None:
        """Take the slot from a request that has ended."""

    def turn(self) -> None:
        """Do one turn, and bring `now` up to its end."""
        self._read_prompts()
        active = [job for job in self._running if 0 < job.num_dispatched < job.output]
        if not active:
            self._receive(0)
            return
        steps = self._costs.decode_steps
        self.decoding_s += self._run(steps * self._costs.step(len(active)))
        self._send({job: min(steps, job.output - job.num_dispatched) for job in active})
        for job in active:
            job.num_dispatched += steps

    def _read_prompts(self) -> None:
        smallest, budget = min(self._costs.chunk_s), max(self._costs.chunk_s)
        while budget >= smallest:
            free = self._slots - len(self._running)
            admissible = self._waiting[:free]
            # A Job has what Prefills asks of a Generation: its prompt and when it came.
            job = cast(Any, self._prefills.next(cast(Any, admissible)))
            if job is None:
                return
            if job not in self._prefills:
                self._waiting.remove(job)
                self._running.append(job)
                job.began = self.now
                chunks = self._costs.chunks(len(job.prefix), self.admit(job))
                self._prefills.add(cast(Any, None), cast(Any, job), chunks)
            _, _, size = self._prefills.chunk(job)
            if size > budget:
                return
            budget -= size
            self.reading_s += self._run(self._costs.chunk_s[size] if size else 0.0)
            if self._prefills.take(job):
                self.reading_s += self._run(self._costs.request_s)
                job.num_dispatched = 1
                self._send({job: 1})

    def _run(self, seconds: float) -> float:
        """Let the device do something after all that was sent before."""
        self._device = max(self._device, self.now) + seconds
        return seconds

    def _send(self, tokens: dict[Job, int]) -> None:
        self._in_flight.append((self._device, tokens))
        self._receive(self._costs.in_flight - 1)

    def _receive(self, left: int) -> None:
        """Read the oldest results until so many are left in flight."""
        while len(self._in_flight) > left:
            ready, tokens = self._in_flight.popleft()
            self.now = max(self.now, ready)
            for job, number in tokens.items():
                job.first = job.first if job.num_received else self.now
                job.num_received += number
                if job.num_received == job.output:
                    job.ended = self.now
                    self._running.remove(job)
                    self.release(job)


class Turns(Replica):
    """Run requests turn by turn, until all have ended; `jobs` then hold their times.

    Args:
        costs: of a turn's parts.
        slots: of the engine; at most the largest number in `costs.step_s`.
        jobs: in the order in which they are submitted.
    """

    def __init__(self, costs: Costs, slots: int, jobs: Sequence[Job]):
        super().__init__(costs, slots)
        to_come = collections.deque(jobs)
        while to_come or self.is_busy:
            if not self.is_busy:
                self.now = max(self.now, to_come[0].submitted)
            while to_come and to_come[0].submitted <= self.now:
                self.submit(to_come.popleft())
            self.turn()


def percentile(values: Iterable[float], percent: float) -> float:
    """Return a percentile as one of the values; the largest, if there are too few."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]
