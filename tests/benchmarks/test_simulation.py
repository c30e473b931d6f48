"""The simulated fleet: exact cases, known waiting times, its traffic, and that nothing is lost."""

import collections
import importlib
import math
import random
import re
import statistics

import pytest

from benchmarks import simulation, traffic
from benchmarks.routing import ROUTINGS, Least, Router, Routers
from benchmarks.traffic import Conversation, Turn, conversations, length
from benchmarks.turns import Costs, Job, Turns

pytest.importorskip("simpy", reason="needs the bench extra")
fleet = importlib.import_module("benchmarks.fleet")  # after the check for simpy
CachedReplica, Request = fleet.CachedReplica, fleet.Request

COSTS = Costs({64: 0.1, 256: 0.3}, {1: 0.01, 4: 0.02}, decode_steps=4)
H200 = Costs({64: 0.009, 256: 0.011}, {8: 0.0063}, decode_steps=16, in_flight=2)


def ask(number, began, *turns):
    """Return a conversation of (prompt, output, shared, gap) turns."""
    return Conversation(number, began, tuple(Turn(*turn) for turn in turns))


def run(given, routers=None, *, costs=COSTS, slots=4, replicas=1, seconds=1e9, seed=0):
    """Return the requests of a fleet."""
    return fleet.Fleet(costs, slots, replicas, routers or Routers(), given, seconds, seed).requests


def answer(replica, conversation, prompt, shared):
    """Let an idle replica answer a turn; return how many of its tokens were cached."""
    request = Request(replica.now, range(prompt), 1, conversation=conversation, shared=shared)
    replica.submit(request)
    while replica.is_busy:
        replica.turn()
    return request.cached


def poisson(rate, count, prompt, output=1):
    """Return conversations of one turn, at random times."""
    source, now = random.Random(1), 0.0
    for number in range(count):
        now += source.expovariate(rate)
        yield ask(number, now, (prompt, output, 0, 0.0))


# Exact cases.


def test_one_replica_takes_the_turns_of_the_engine():
    """`Turns`, which other tests compare with the engine, has the same times for each request."""
    given = [each for each in conversations(2.5, 200, 1e9) if len(each.turns) == 1]
    jobs = [Job(c.began, range(c.turns[0].prompt), c.turns[0].output) for c in given]
    Turns(H200, 8, jobs)
    requests = run(given, costs=H200, slots=8)
    assert len(requests) > 100
    assert max(job.began - job.submitted for job in jobs) > 1  # some had to wait
    for job, request in zip(jobs, requests, strict=True):
        assert request.sent == request.submitted == pytest.approx(job.submitted)
        assert (request.first, request.ended) == pytest.approx((job.first, job.ended))


def test_a_turn_reuses_whole_chunks_of_the_one_before():
    """300 tokens take 0.3 + 0.1 s. Of 600 the first 256 are there; the others take 2 x 0.3 s."""
    first, second = run([ask(0, 1.0, (300, 5, 0, 2.0), (600, 1, 300, 0.0))])
    assert first.first == pytest.approx(1.4)
    assert first.ended == pytest.approx(1.4 + 4 * 0.01)
    assert second.sent == pytest.approx(first.ended + 2.0)
    assert second.cached == 256
    assert second.ended == pytest.approx(second.sent + 0.6)


def test_a_prompt_of_which_all_is_there_has_its_last_chunk_read():
    _, second = run([ask(0, 1.0, (512, 1, 0, 2.0), (512, 1, 512, 0.0))])
    assert second.cached == 256
    assert second.ended == pytest.approx(second.sent + 0.3)


@pytest.mark.parametrize(("slots", "cached"), [(1, 0), (2, 256)])
def test_a_slot_keeps_a_prompt_until_it_is_assigned_again(slots, cached):
    """Another request comes between: of two slots it gets the one unused for longer."""
    given = [ask(0, 0.0, (300, 1, 0, 10.0), (600, 1, 300, 0.0)), ask(1, 5.0, (300, 1, 0, 0.0))]
    requests = run(given, slots=slots)
    assert [(r.conversation, r.cached) for r in requests] == [(0, 0), (1, 0), (0, cached)]


def test_a_replica_reuses_no_more_than_it_has_read():
    """The turn before was elsewhere: it holds 300 tokens, of which 256 are whole chunks."""
    replica = CachedReplica(COSTS, 4)
    assert [answer(replica, 0, *turn) for turn in ((300, 0), (2000, 1100))] == [0, 256]


def test_a_turn_that_moves_to_another_slot_is_found_there():
    """100 tokens are no whole chunk, so the second turn gets the other slot, and the first is free.

    Another conversation gets that one. The third turn finds what the second has left.
    """
    replica = CachedReplica(COSTS, 2)
    turns = [(0, 100, 0), (0, 700, 100), (1, 300, 0), (0, 900, 700)]
    assert [answer(replica, *turn) for turn in turns] == [0, 0, 0, 512]


def test_the_slot_assigned_longest_ago_is_lost_first():
    """By the engine's rule, however long its answer has taken."""
    replica = CachedReplica(COSTS, 2)
    long, short = Request(0.0, range(300), 50), Request(0.0, range(300), 1, conversation=1)
    replica.submit(long)
    replica.submit(short)
    while replica.is_busy:
        replica.turn()
    assert long.ended > short.ended
    assert [answer(replica, *turn) for turn in ((2, 300, 0), (1, 600, 300))] == [0, 256]


def test_three_requests_share_a_replica_turn_by_turn():
    """By hand: a turn reads one chunk at most, then takes four steps of every answer.

    A comes at 0. Its chunk and four steps take 0.1 + 0.04: B, of 0.01, waits for them. B's chunk
    and four steps of both (a program of four slots) end at 0.14 + 0.1 + 0.08 = 0.32. The same of C,
    of 0.2, at 0.32 + 0.1 + 0.08: by then A has nothing left, and B and C each have one token left.
    """
    asked = [ask(0, 0.0, (64, 9, 0, 0.0)), ask(1, 0.01, (64, 10, 0, 0.0))]
    asked.append(ask(2, 0.2, (64, 6, 0, 0.0)))
    costs = Costs({64: 0.1}, {1: 0.01, 4: 0.02}, decode_steps=4)
    requests = run(asked, costs=costs)
    assert [r.first for r in requests] == pytest.approx([0.1, 0.24, 0.42])
    assert [r.ended for r in requests] == pytest.approx([0.32, 0.58, 0.58])


@pytest.mark.parametrize("routing", ["prefix", "session"])
@pytest.mark.parametrize("turns", [2, 5])
def test_where_nothing_is_evicted_all_turns_but_the_first_are_hits(routing, turns):
    """The rate is 1 - 1 / turns. Random routing comes back only by chance."""
    prompts = [256 * (1 + turn) + 1 for turn in range(turns)]
    grown = [(now, 2, before, 1.0) for before, now in zip([0, *prompts], prompts, strict=False)]
    given = [ask(number, 0.01 * number, *grown) for number in range(80)]

    def hits(name):
        requests = run(given, Routers(name), costs=H200, slots=80, replicas=8)
        assert len(requests) == 80 * turns
        return sum(r.cached > 0 for r in requests) / len(requests)

    assert hits(routing) == 1 - 1 / turns
    assert hits("random") < 0.75 * (1 - 1 / turns)


def test_requests_that_would_come_after_the_end_do_not():
    given = [ask(0, 0.0, (64, 1, 0, 5.0), (64, 1, 64, 0.0)), ask(1, 3.0, (64, 1, 0, 5.0))]
    assert [r.conversation for r in run(given, seconds=5.0)] == [0, 1]


# Known waiting times.


@pytest.mark.parametrize(
    ("busy", "count"), [(0.5, 8000), pytest.param(0.8, 40_000, marks=pytest.mark.slow)]
)
def test_equal_requests_wait_as_in_an_m_d_1_queue(busy, count):
    """Pollaczek and Khinchine: rho s / (2 (1 - rho))."""
    requests = run(poisson(busy / 0.1, count, 64), slots=1)
    waits = [request.first - request.sent - 0.1 for request in requests]
    assert min(waits) > -1e-6
    assert statistics.fmean(waits) == pytest.approx(busy * 0.1 / (2 * (1 - busy)), rel=0.06)


def test_a_router_is_an_m_d_1_queue():
    """Before so many replicas that nobody waits there."""
    routers = Routers("least", cores=1, request_s=0.1)
    requests = run(poisson(6.0, 8000, 64), routers, replicas=4)
    waits = [request.submitted - request.sent - 0.1 for request in requests]
    assert statistics.fmean(waits) == pytest.approx(0.6 * 0.1 / (2 * 0.4), rel=0.06)
    assert max(request.first - request.submitted for request in requests) == pytest.approx(0.1)


def test_two_cores_of_a_router_serve_two_requests_at_once():
    given = [ask(number, 0.0, (64, 1, 0, 0.0)) for number in range(3)]
    requests = run(given, Routers("least", cores=2, request_s=1.0), replicas=3)
    assert [r.submitted for r in requests] == pytest.approx([1.0, 1.0, 2.0])


# Nothing is lost.


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("routers", [1, 3])
def test_every_request_is_answered_once(routing, routers):
    """By every routing the same: those that came before the end, and each after the one before."""
    seconds, gap_s = 60.0, 2.0
    given = list(conversations(12.0, seconds, gap_s))
    front = Routers(routing, routers, 2, 0.001)
    requests = run(iter(given), front, costs=H200, slots=8, replicas=6, seconds=seconds)
    by_conversation = collections.defaultdict(list)
    for request in requests:
        assert request.sent < request.submitted < request.first <= request.ended
        assert request.num_received == request.output
        assert request.sent < seconds
        assert request.cached <= request.shared
        by_conversation[request.conversation].append(request)
    assert len(by_conversation) == len(given)
    for conversation in given:
        found = by_conversation[conversation.number]
        turns = conversation.turns[: len(found)]
        assert [len(r.prefix) for r in found] == [turn.prompt for turn in turns]
        comes = [conversation.began]
        comes += [r.ended + turn.gap_s for r, turn in zip(found, turns, strict=True)]
        assert [r.sent for r in found] == pytest.approx(comes[:-1])
        assert len(found) == len(conversation.turns) or comes[-1] >= seconds


# Routing.


def test_least_is_one_of_those_with_the_fewest():
    source = random.Random(3)
    least, counts = Least(7, random.Random(4)), [0] * 7
    chosen = set()
    for _ in range(3000):
        replica = least.choose()
        assert counts[replica] == min(counts) == least.fewest
        chosen.add(replica)
        if source.random() < 0.55:
            change = 1
        else:
            change, replica = -1, source.choice([i for i, n in enumerate(counts) if n] or [None])
        if replica is not None:
            counts[replica] += change
            least.add(replica, change)
        assert least.counts == counts
    assert chosen == set(range(7))


def test_a_prefix_is_followed_until_its_replica_has_a_set_of_slots_more_to_do():
    router = Router("prefix", 3, 4, "0")
    first = router.choose(0)
    assert [router.choose(0) for _ in range(4)] == [first] * 4
    assert router.choose(0) != first  # five there, none elsewhere
    others = {router.choose(n) for n in range(1, 5)}
    assert first not in others


def test_all_routers_send_a_session_to_one_replica():
    routers = [Router("session", 50, 4, str(n)) for n in range(3)]
    places = [{router.choose(session) for router in routers} for session in range(200)]
    assert all(len(place) == 1 for place in places)
    assert len(set.union(*places)) > 40


# Traffic.


def test_traffic_has_the_published_statistics():
    given = list(conversations(50.0, 1000.0, 1e-9))
    turns = [turn for each in given for turn in each.turns]
    prompts = sorted(turn.prompt for turn in turns)
    for share, tokens in zip(*traffic.PROMPT, strict=True):
        if 0 < share < 1:
            assert prompts[int(share * len(prompts))] == pytest.approx(tokens, rel=0.04)
    assert statistics.fmean(prompts) == pytest.approx(830, rel=0.08)  # published
    assert statistics.fmean(turn.output for turn in turns) == pytest.approx(271, rel=0.08)
    follow_ups = sum(len(each.turns) - 1 for each in given) / len(turns)
    assert follow_ups == pytest.approx(0.4635, abs=0.01)
    assert statistics.median(turn.gap_s for turn in turns) == pytest.approx(1e-9, rel=0.03)
    assert all(turn.prompt + turn.output <= traffic.CONTEXT for turn in turns)
    assert all(0 <= turn.shared <= turn.prompt for turn in turns)


def test_traffic_is_steady_from_the_beginning():
    """With gaps as long as a quarter of the time, each quarter has as many and as long prompts."""
    rate, seconds = 40.0, 400.0
    prompts = collections.defaultdict(list)
    for each in conversations(rate, seconds, seconds / 4):
        now = each.began
        for turn in each.turns:
            prompts[int(4 * now / seconds)].append(turn.prompt)
            now += turn.gap_s
    mean = statistics.fmean(length(random.Random(number), traffic.PROMPT) for number in range(9999))
    for quarter in range(4):
        assert len(prompts[quarter]) == pytest.approx(rate * seconds / 4, rel=4 / math.sqrt(4000))
        assert statistics.fmean(prompts[quarter]) == pytest.approx(mean, rel=0.05)


def test_routing_at_random_does_not_depend_on_the_size():
    """Each replica then has its own Poisson arrivals, so all sizes have the same waits."""
    waits = []
    for replicas in (4, 40):
        rate, seconds = 1.5 * replicas, 4000 / (1.5 * replicas) + 100
        given = conversations(rate, seconds, 100.0, seed=replicas)
        requests = run(given, costs=H200, slots=8, replicas=replicas, seconds=seconds)
        waits.append(statistics.fmean(r.first - r.sent for r in requests if r.sent > 80))
    assert waits[0] == pytest.approx(waits[1], rel=0.15)


# The command.


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(simulation, "LEAST_REQUESTS", 100)


def test_a_seed_always_gives_the_same_table(cli, small):
    flags = ["--replicas=2,4", "--requests=100", "--gap_s=1", "--routing=prefix,random"]
    status, out, err = cli(simulation, *flags)
    assert (status, cli(simulation, *flags)[1]) == (0, out)
    assert cli(simulation, *flags, "--seed=1")[1] != out
    most, *rows = out.splitlines()
    assert re.fullmatch(r"a replica answers at most 2\.\d+ requests/s; 70% of it comes", most)
    assert [row.split()[:2] for row in rows[1:]] == [
        *(["2", "prefix"], ["2", "random"]),
        *(["4", "prefix"], ["4", "random"]),
    ]
    assert err.splitlines()[-1] == "4 replicas, random"


def test_a_router_that_is_too_slow_leaves_no_good_answers(cli, small):
    flags = ["--replicas=4", "--requests=100", "--routing=least", "--router_cores=1"]
    good = []
    for router_ms in (1, 2000):
        _, out, _ = cli(simulation, *flags, f"--router_ms={router_ms}")
        good.append(float(re.findall(r"([\d.]+)%", out.splitlines()[-1])[0]))
    assert good[0] > 80
    assert good[1] < 1


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--routing=x", "--routing has 'x', expected random, least, prefix, session"),
        ("--replicas=0", "--replicas has '0', expected whole numbers from 1 on"),
        ("--busy=0", "--busy is 0, expected more than 0"),
        ("--gap_s=0", "--gap_s is 0, expected more than 0"),
        ("--decode_rates=8", "--decode_rates has '8', expected SLOTS:TOKENS_PER_S such as 8:200"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(cli, flag, expected):
    assert cli(simulation, flag) == (2, "", f"error: {expected}; see --help\n")
