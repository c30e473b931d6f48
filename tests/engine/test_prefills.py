"""The order in which prompts are read: a short one is not held up, and each is read to its end."""

import hypothesis
import pytest
from hypothesis import strategies as st

from llama_jax import Llama
from llama_jax.engine.engine import Engine
from llama_jax.engine.prefills import Prefills
from llama_jax.engine.request import make_request

CHUNK = 16


class Prompt:
    """A generation's part in it."""

    background = False

    def __init__(self, length, submitted=0):
        self.prefix, self.submitted = [3] * length, submitted


def chunks(prompt):
    return [(start, CHUNK) for start in range(0, len(prompt.prefix), CHUNK)]


def read_chunk(prefills, waiting):
    """Read the chunk that is next; return whose it was, or None, and whether it was the last."""
    if (chosen := prefills.next(waiting)) is None:
        return None, False
    if chosen not in prefills:
        waiting.remove(chosen)
        prefills.add(None, chosen, chunks(chosen))
    return chosen, prefills.take(chosen)


@hypothesis.given(st.lists(st.none() | st.integers(1, 200), max_size=60))
def test_each_second_chunk_is_the_oldest_prompts_and_the_others_the_shortest(events):
    """Numbers are lengths of prompts that arrive; None reads a chunk."""
    prefills, waiting, left = Prefills(), [], {}
    previous_was_of_oldest = None
    for now, length in enumerate([*events, *[None] * 800]):
        if length is not None:
            waiting.append(Prompt(length, now))
            left[waiting[-1]] = len(chunks(waiting[-1]))
            continue
        oldest = min(left, key=lambda each: each.submitted, default=None)
        fewest = min(left.values(), default=None)
        chosen, done = read_chunk(prefills, waiting)
        if chosen is None:
            assert not left
            continue
        is_oldest, is_shortest = chosen is oldest, left[chosen] == fewest
        assert is_oldest or is_shortest
        if previous_was_of_oldest is not None:
            assert is_oldest if previous_was_of_oldest is False else is_shortest
        previous_was_of_oldest = None if is_oldest and is_shortest else is_oldest
        left[chosen] -= 1
        assert done == (left[chosen] == 0)
        if done:
            del left[chosen]
    assert not left


def test_short_prompts_without_end_do_not_starve_a_long_one():
    prefills, long = Prefills(), Prompt(10 * CHUNK)
    waiting, read = [long], 0
    for now in range(1, 100):
        waiting.append(Prompt(2 * CHUNK, now))
        chosen, done = read_chunk(prefills, waiting)
        read += 1
        if chosen is long and done:
            break
    assert read <= 20


@pytest.mark.slow
def test_a_short_prompt_waits_for_one_chunk_of_long_ones():
    llm = Llama.load(slots=8, context=512)
    sizes = llm.executor.plan.prefill_sizes
    long = make_request(prompt_tokens=[3, *range(10, 410)], max_tokens=2, temperature=0)
    short = make_request(prompt_tokens=[5, 6, 7], max_tokens=2, temperature=0)
    others = [llm.engine.submit(long, client="greedy") for _ in range(12)]
    llm.engine.step()
    polite = llm.engine.submit(short, client="polite")
    llm.engine.step()
    llm.engine.step()
    assert polite.error is None
    assert polite.tokens
    assert len(long.prompt_tokens) > 2 * sizes[-1]
    assert not any(each.tokens for each in others)
    while not all(each.done for each in (*others, polite)):
        llm.engine.step()
    # Those that wait reuse what the first reads: none began before it was read.
    reused = [each.reused for each in others]
    assert all(reused[1:])
    assert reused[0] == 0
    alone = Engine(llm.executor, llm.tokenizer)
    for request, got in ((long, others), (short, [polite])):
        expected = alone.submit(request)
        while not expected.done:
            alone.step()
        assert expected.reused == 0
        assert all(each.tokens == expected.tokens for each in got)
