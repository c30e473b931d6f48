"""Stop strings: the answer ends before the first, however its text came in pieces."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.text.stop import StopCutter
from tests.helpers.oracles import first_stop

# Few letters, so that stop strings occur, overlap and begin within one another.
TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)
CUTS = st.sets(st.integers(1, 30))


def pieces(text, cuts):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(TEXTS, STOPS, CUTS)
@example("abc", ["abc", "b"], set())  # one that begins first and ends last
@example("abc", ["abc", "b"], {1, 2})
@example("abc", ["bc", "abc"], {2})
@example("aab", ["ab"], {1, 2})
def test_all_that_comes_before_the_first_stop_string_is_passed_on(text, stops, cuts):
    cutter = StopCutter(stops)
    passed = [cutter.push(piece) for piece in pieces(text, cuts)]
    passed.append(cutter.finish())
    assert "".join(passed) == text[: first_stop(text, stops)]
    assert cutter.stopped == (first_stop(text, stops) is not None)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(TEXTS, STOPS, CUTS)
def test_what_may_be_a_beginning_is_held_back_and_nothing_else(text, stops, cuts):
    cutter, came, passed = StopCutter(stops), "", ""
    for piece in pieces(text, cuts):
        came += piece
        passed += cutter.push(piece)
        if cutter.stopped:
            return
        beginnings = [
            start
            for start in range(len(came))
            if any(stop.startswith(came[start:]) for stop in stops)
        ]
        assert len(passed) == min(beginnings, default=len(came))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS, STOPS, TEXTS)
def test_nothing_is_passed_on_after_a_stop(text, stops, more):
    cutter = StopCutter([*stops, "cab"])
    cutter.push(text + "cab")
    assert cutter.stopped
    assert cutter.push(more) + cutter.finish() == ""
    assert cutter.stopped


@pytest.mark.parametrize("text", ["", "word", "\n\n", "a\0b", "é😀"])
def test_without_stop_strings_text_passes_through_at_once(text):
    cutter = StopCutter(())
    assert (cutter.push(text), cutter.finish(), cutter.stopped) == (text, "", False)


def test_a_stop_string_of_any_characters():
    cutter = StopCutter(["\n\n", "😀!", ".*"])
    assert [cutter.push(c) for c in "a\nb😀c."] == ["a", "", "\nb", "", "😀c", ""]
    assert cutter.push("*d") == ""
    assert cutter.stopped
