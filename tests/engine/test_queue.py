"""The queue's order: one client's requests keep theirs, clients take turns."""

import collections
import contextlib
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from llama_jax import Llama, QueueFullError
from llama_jax.engine.queue import ACTIVE_S, Queue
from llama_jax.engine.request import make_request


class Waiting:
    """A request that waits."""

    def __init__(self, client, number, max_slots=None):
        self.client, self.number, self.max_slots = client, number, max_slots


def taken(queue):
    """Return (client, number) of all in the order in which they get slots."""
    order = []
    while first := queue.next(1, []):
        queue.take(first[0])
        order.append((first[0].client, first[0].number))
    return order


def test_clients_take_turns():
    queue = Queue()
    for client, number in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("b", 1)]:
        queue.append(Waiting(client, number))
    assert (len(queue), queue.count("a"), queue.count("x")) == (6, 3, 0)
    expected = [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert [(each.client, each.number) for each in queue.next(7, [])] == expected[:6]
    assert taken(queue) == expected
    assert (len(queue), list(queue), queue.next(1, [])) == (0, [], [])


@hypothesis.given(st.lists(st.sampled_from("abc-x"), max_size=60), st.randoms())
def test_no_request_waits_for_more_than_one_of_each_other_client(events, random):
    """Letters arrive, `-` gives a slot, `x` cancels one that waits."""
    queue, waiting = Queue(), []
    since = collections.Counter()  # slots given to others since a client's first began to wait
    for number, event in enumerate(events):
        if event == "-":
            firsts = queue.next(1, [])
            assert bool(firsts) == bool(waiting)
            if not firsts:
                continue
            [first] = firsts
            own = [each for each in waiting if each.client == first.client]
            assert own[0] is first
            queue.take(first)
            waiting.remove(first)
            for other in {each.client for each in waiting} - {first.client}:
                since[other, first.client] += 1
                assert since[other, first.client] <= 1
            for key in [key for key in since if key[0] == first.client]:
                del since[key]
        elif event == "x":
            if waiting:
                each = waiting.pop(random.randrange(len(waiting)))
                queue.remove(each)
                if not any(other.client == each.client for other in waiting):
                    for key in [key for key in since if key[0] == each.client]:
                        del since[key]
        else:
            waiting.append(Waiting(event, number))
            queue.append(waiting[-1])
        assert sorted(each.number for each in queue) == [each.number for each in waiting]


@hypothesis.given(st.lists(st.sampled_from("abc")), st.integers(1, 12), st.randoms())
def test_the_next_may_get_their_slots_in_any_order(clients, free, random):
    """Clients without a slot keep theirs, and the last slot is no second one of a client."""
    queue, holders = Queue(), []
    for number, client in enumerate(clients):
        queue.append(Waiting(client, number))
    while left := queue.next(free, holders):
        one = random.choice(left)
        queue.take(one)
        assert one not in list(queue)
        assert free > 1 or one.client not in holders or set(clients) == {one.client}
        free, holders = free - 1, [*holders, one.client]
        new = {each.client for each in left} - set(holders)
        assert new <= {each.client for each in queue.next(free, holders)}
    assert free <= 1 or not queue


def test_the_last_slot_is_kept_while_another_client_is_active(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    queue = Queue()
    queue.append(Waiting("polite", 0))
    queue.take(*queue.next(1, []))
    for number in range(5):
        queue.append(Waiting("greedy", number))
    assert len(queue.next(3, [])) == 2  # the first, and one more
    assert len(queue.next(3, ["greedy"])) == 2
    assert queue.next(1, ["greedy"]) == []
    queue.append(Waiting("polite", 1))
    assert [each.client for each in queue.next(1, ["greedy"])] == ["polite"]
    queue.take(*queue.next(1, ["greedy"]))
    now = ACTIVE_S - 1
    assert queue.next(1, ["greedy"]) == []
    now = ACTIVE_S + 1
    assert queue.next(1, ["greedy", "polite"]) == []  # it still has a slot
    assert len(queue.next(1, ["greedy"])) == 1
    assert len(queue.next(9, ["greedy"])) == 5


def test_a_client_has_its_slots_while_another_is_active(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    queue = Queue()
    for number in range(5):
        queue.append(Waiting("greedy", number, max_slots=2))
    assert len(queue.next(8, [])) == 5  # alone
    queue.append(Waiting("polite", 0, max_slots=2))
    found = [(each.client, each.number) for each in queue.next(8, [])]
    assert found == [("greedy", 0), ("polite", 0), ("greedy", 1)]
    assert [each.client for each in queue.next(8, ["greedy", "greedy"])] == ["polite"]
    queue.take(*queue.next(1, ["greedy", "greedy"]))
    assert queue.next(6, ["greedy", "greedy"]) == []
    now = ACTIVE_S + 1
    assert len(queue.next(6, ["greedy", "greedy"])) == 5


def test_an_eighth_of_the_queue_is_kept_for_clients_of_which_none_waits(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    llm = Llama.load(slots=1, context=64, max_queue=16)
    ask = make_request(prompt="Hello", max_tokens=2, temperature=0)

    def fill(client):
        """Submit until refused; return how many places of the queue are taken then."""
        with contextlib.suppress(QueueFullError):
            for _ in range(20):
                llm.engine.submit(ask, client=client)
        return llm.engine.queued - 1  # one is for the free slot

    llm.engine.submit(ask, client="polite")
    while llm.engine.step():
        pass
    assert fill("greedy") == 14
    llm.engine.submit(ask, client="polite")
    assert fill("polite") == 15  # its second is refused, as another's first may come
    llm.engine.submit(ask, client="third")
    with pytest.raises(QueueFullError, match="17 requests wait already"):
        llm.engine.submit(ask, client="fourth")
    while llm.engine.step():
        pass
    now = ACTIVE_S + 1  # alone again
    assert fill("greedy") == 16


def test_one_client_with_many_requests_holds_no_other_up_and_has_its_share():
    llm = Llama.load(slots=1, context=64)
    ask = make_request(prompt="Hello", max_tokens=2, temperature=0)
    greedy = [llm.engine.submit(ask, client="greedy", share=4) for _ in range(5)]
    with pytest.raises(QueueFullError, match="5 requests of this client wait already"):
        llm.engine.submit(ask, client="greedy", share=4)
    polite = llm.engine.submit(ask, client="polite", share=4)
    while not polite.done:
        llm.engine.step()
    assert [each.done for each in greedy] == [True, False, False, False, False]
    while not all(each.done for each in greedy):
        llm.engine.step()
    assert all(each.tokens == polite.tokens for each in greedy)
