"""Which slot a prompt gets, and how much of what slots hold it reuses."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.engine.slots import Slot, assign_slot

BUSY = types.SimpleNamespace(prompt=[1, 2, 3])

TOKENS = st.lists(st.integers(0, 2), max_size=20)  # few, so that beginnings are shared


@st.composite
def some_slots(draw):
    """One to five slots in any condition, at least one of them free."""
    used = draw(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True))
    free = draw(st.integers(0, len(used) - 1))
    return [
        Slot(
            row,
            generation=BUSY if row != free and draw(st.booleans()) else None,
            cached=draw(TOKENS),
            last_used=when,
        )
        for row, when in enumerate(used)
    ]


def common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TOKENS, TOKENS)
def test_common_counts_the_shared_beginning(cached, prompt):
    assert Slot(0, cached=cached).common_prefix_len(prompt) == common(cached, prompt)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(some_slots(), TOKENS.filter(len), st.sampled_from([None, 1, 2, 4]))
def test_a_choice_is_free_and_true_and_reuses_all_that_it_can(slots, prompt, multiple):
    slot, source, start = assign_slot(slots, prompt, multiple, 4)
    assert slot.generation is None
    assert source.cached[:start] == prompt[:start]
    if multiple is None:
        assert start == 0
    else:
        # One token is left to be read, for its logits.
        longest = min(max(common(s.cached, prompt) for s in slots), len(prompt) - 1)
        assert start == longest // multiple * multiple
    if start == 0:
        assert source is slot  # there is nothing to copy
    equals = [s for s in slots if common(s.cached, prompt) == common(source.cached, prompt)]
    assert source.generation is None or start == 0 or not any(s.generation is None for s in equals)
    if source is not slot or start == 0:
        assert slot.last_used == min(s.last_used for s in slots if s.generation is None)


def test_a_cache_that_the_prompt_goes_on_from_is_used_where_it_is():
    slots = [Slot(0, cached=[1, 2, 3, 4], last_used=1), Slot(1, cached=[5, 6, 7, 8], last_used=2)]
    assert assign_slot(slots, [5, 6, 7, 8, 9], 2, 4) == (slots[1], slots[1], 4)


def test_a_cache_that_would_be_lost_for_a_short_beginning_is_copied():
    """Here the system prompt is shared, and the long conversation behind it is kept."""
    slots = [Slot(0, cached=[1] * 9, last_used=1), Slot(1, cached=[5, 6, 7, 8, 9], last_used=2)]
    assert assign_slot(slots, [5, 6, 1], 2, 4) == (slots[0], slots[1], 2)
    assert assign_slot(slots, [5, 6, 7, 8, 1], 2, 4) == (slots[1], slots[1], 4)


def test_a_busy_slot_is_a_source_but_never_the_choice():
    slots = [
        Slot(0, generation=BUSY, cached=[1, 2, 3], last_used=3),
        Slot(1, cached=[1, 2], last_used=2),
        Slot(2, last_used=1),
    ]
    assert assign_slot(slots, [1, 2, 3, 4], 1, 4) == (slots[2], slots[0], 3)


def of_two_replicas(**cached):
    """Slots 0 and 1 of the first replica, 2 and 3 of the second."""
    return [Slot(i, i // 2, cached=cached.get(f"slot_{i}", []), last_used=i) for i in range(4)]


def test_a_prompt_goes_to_the_replica_that_spares_it_a_chunk():
    slots = of_two_replicas(slot_2=[1, 2, 3, 4, 9, 9, 9, 9, 9], slot_0=[1, 2, 3])
    slots[3].generation = BUSY
    assert assign_slot(slots, [1, 2, 3, 4, 5], 2, 4) == (slots[2], slots[2], 4)
    slots[2].generation = BUSY  # nothing is copied from one replica to another
    assert assign_slot(slots, [1, 2, 3, 4, 5], 2, 4) == (slots[0], slots[0], 2)


def test_less_than_a_chunk_draws_no_prompt_to_a_busier_replica():
    slots = of_two_replicas(slot_1=[1, 2])
    assert assign_slot(slots, [1, 2, 3], 2, 4) == (slots[1], slots[1], 2)
    slots[0].generation = BUSY
    assert assign_slot(slots, [1, 2, 3], 2, 4) == (slots[2], slots[2], 0)
    slots[2].generation = BUSY
    assert assign_slot(slots, [1, 2, 3], 2, 4) == (slots[1], slots[1], 2)


def test_the_position_is_that_of_the_last_token_dispatched():
    """The first, which the prompt's last chunk draws, is fed behind the prompt."""
    slot = Slot(0, generation=BUSY)
    slot.num_dispatched = 1
    assert slot.position == 3
    slot.num_dispatched += 8
    assert slot.position == 11
