"""How a fleet answers: routing and size, simulated with the measured speed of a replica.

  python -m benchmarks.simulation --replicas=1,10,100,1000

Requests are those of benchmarks/traffic.py (published statistics), replicas and routers those of
benchmarks/fleet.py. Nothing is run but arithmetic, and a seed always gives the same table. By
default a replica is 7B in bfloat16 with 8 slots on one H200: 256 tokens of a prompt at 23,126 a
second, a decode step at 1,262 (docs/performance.md, "On a GPU"). docs/scaling.md has the results.
"""

import dataclasses
import gc
import itertools
import random
import sys
from typing import Any

from absl import flags

from benchmarks import command, cost_flags
from benchmarks.report import number, table
from benchmarks.routing import ROUTINGS, Routers
from benchmarks.traffic import GAP_S, OUTPUT, PROMPT, conversations, length
from benchmarks.turns import Costs, Job, Turns, percentile
from llama_jax.errors import InputError

LEAST_REQUESTS = 20_000

FLAGS = flags.FlagValues()
cost_flags.define(FLAGS, "64:7000,256:23126", "8:1262", decode_steps=16, in_flight=2)
for _name, _default, _text in (
    ("replicas", "1,10,100,1000", "Numbers of replicas."),
    (
        "routing",
        ",".join(ROUTINGS),
        "random; least: fewest requests under way; prefix: where the turn before was, unless that "
        "has a replica's slots more under way than the least; session: by a hash of its name.",
    ),
):
    flags.DEFINE_list(_name, _default, _text, flag_values=FLAGS)
for _name, _default, _text in (
    ("busy", 0.7, "Requests, as a share of what the replicas answer without a prefix cache."),
    ("gap_s", round(GAP_S, 1), "Median seconds from an answer to the session's next request."),
    ("router_ms", 2.8, "Milliseconds of a router's core that a request takes."),
    ("first_s", 2.0, "An answer is good if its first token comes within so many seconds,"),
    ("token_s", 0.05, "and its others take so many seconds each, on average."),
):
    flags.DEFINE_float(_name, _default, _text, lower_bound=0.0, flag_values=FLAGS)
for _name, _default, _text in (
    ("routers", 1, "Equal ones. Each request comes to a random one."),
    ("router_cores", 16, "Cores of each router."),
    ("requests", 300, f"For each replica, and at least {LEAST_REQUESTS:,}; the later half counts."),
):
    flags.DEFINE_integer(_name, _default, _text, lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of all that is random.", flag_values=FLAGS)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What became of a fleet's requests."""

    requests_per_s: float
    """That came."""
    good: float
    """Share of them that was answered within the limits."""
    first_s: tuple[float, float]
    """Seconds to the first token, p50 and p99."""
    cached: float
    """Share of the prompts' tokens that came from a prefix cache."""
    router_s: float
    """Seconds in a router, p99."""


def capacity(costs: Costs, slots: int, requests: int = 4000) -> float:
    """Return the requests a second that a replica answers when there are always some that wait."""
    source = random.Random(0)
    jobs = [
        Job(0.0, range(length(source, PROMPT)), length(source, OUTPUT)) for _ in range(requests)
    ]
    return requests / Turns(costs, slots, jobs).now


def simulate(costs: Costs, slots: int, replicas: int, routers: Routers, rate: float) -> Figures:
    """Return the figures of one fleet, by the flags.

    Args:
        costs: of a replica's turns.
        slots: of each replica.
        replicas: how many there are.
        routers: what stands before them.
        rate: of requests, a second.
    """
    from benchmarks.fleet import Fleet  # here: without simpy, `run` says so in one line

    seconds = max(FLAGS.requests * replicas, LEAST_REQUESTS) / rate
    traffic = conversations(rate, seconds, FLAGS.gap_s, FLAGS.seed)
    fleet = Fleet(costs, slots, replicas, routers, traffic, seconds, FLAGS.seed)
    counted = [request for request in fleet.requests if request.sent >= seconds / 2]
    first = [request.first - request.sent for request in counted]
    token = [(each.ended - each.first) / max(1, each.output - 1) for each in counted]
    good = sum(
        one <= FLAGS.first_s and other <= FLAGS.token_s
        for one, other in zip(first, token, strict=True)
    )
    return Figures(
        len(counted) / (seconds / 2),
        good / len(counted),
        (percentile(first, 50), percentile(first, 99)),
        sum(each.cached for each in counted) / sum(len(each.prefix) for each in counted),
        percentile((each.submitted - each.sent for each in counted), 99),
    )


def row(costs: Costs, slots: int, rate: float, replicas: int, routing: str) -> dict[str, Any]:
    """Return a fleet's figures as a row of the table.

    Args:
        costs: of a replica's turns.
        slots: of each replica.
        rate: of requests for each replica, a second.
        replicas: how many there are.
        routing: of the routers.
    """
    command.note(f"{replicas:,} replicas, {routing}")
    routers = Routers(routing, FLAGS.routers, FLAGS.router_cores, FLAGS.router_ms / 1e3)
    gc.disable()  # it would look at millions of live objects again and again
    try:
        found = simulate(costs, slots, replicas, routers, rate * replicas)
    finally:
        gc.enable()
    return {
        "replicas": replicas,
        "routing": routing,
        "requests/s": found.requests_per_s,
        "good/s": found.requests_per_s * found.good,
        "good": f"{found.good:.1%}",
        "first token p50 s": found.first_s[0],
        "p99 s": found.first_s[1],
        "cached": f"{found.cached:.1%}",
        "router p99 ms": 1e3 * found.router_s,
    }


def run() -> int:
    """Simulate what the flags say; return the exit status."""
    command.check_modules("benchmarks.simulation", ("simpy",))
    costs = cost_flags.read(FLAGS)
    sizes = command.read_numbers(FLAGS, "replicas")
    routings: list[str] = FLAGS["routing"].value or []
    command.check_choices("--routing", routings, ROUTINGS)
    for name, value in (("busy", FLAGS.busy), ("gap_s", FLAGS.gap_s)):
        if not value > 0:
            raise InputError(f"--{name} is {value:g}, expected more than 0")
    slots = max(costs.step_s)
    most = capacity(costs, slots)
    print(f"a replica answers at most {number(most)} requests/s; {FLAGS.busy:.0%} of it comes")
    fleets = itertools.product(sizes, routings)
    print(table([row(costs, slots, FLAGS.busy * most, *each) for each in fleets]))
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
