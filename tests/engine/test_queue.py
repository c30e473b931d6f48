"""The queue's order: one client's requests keep theirs, clients take turns."""

import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from llama_jax import Llama, QueueFullError
from llama_jax.engine.queue import Queue
from llama_jax.engine.request import make_request


class Waiting:
    """A request that waits."""

    def __init__(self, client, number):
        self.client, self.number = client, number


def taken(queue):
    """Return (client, number) of all in the order in which they get slots."""
    order = []
    while (first := queue.first) is not None:
        assert queue.take() is first
        order.append((first.client, first.number))
    return order


def test_clients_take_turns():
    queue = Queue()
    for client, number in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("b", 1)]:
        queue.append(Waiting(client, number))
    assert (len(queue), queue.count("a"), queue.count("x")) == (6, 3, 0)
    expected = [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert taken(queue) == expected
    assert (len(queue), list(queue), queue.first) == (0, [], None)


@hypothesis.given(st.lists(st.sampled_from("abc-x"), max_size=60), st.randoms())
def test_no_request_waits_for_more_than_one_of_each_other_client(events, random):
    """Letters arrive, `-` gives a slot, `x` cancels one that waits."""
    queue, waiting = Queue(), []
    since = collections.Counter()  # slots given to others since a client's first began to wait
    for number, event in enumerate(events):
        if event == "-":
            first = queue.first
            assert (first is None) == (not waiting)
            if first is None:
                continue
            own = [each for each in waiting if each.client == first.client]
            assert own[0] is first
            assert queue.take() is first
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
