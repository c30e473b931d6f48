"""One request from token ids to text: its pieces are its result, whatever ends it."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.decode.steps import Logprobs
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.clock import Clock
from llama_jax.engine.draw import Draw
from llama_jax.engine.generation import Generation, token_logprobs
from llama_jax.engine.request import make_request
from llama_jax.engine.result import TokenLogprob, Usage
from llama_jax.text.tokenizer import EOS_ID, Tokenizer
from tests.helpers.oracles import first_stop

TOKENIZER = Tokenizer(DEMO_CHECKPOINT / "tokenizer.model")
PARIS = TOKENIZER.encode("The capital of France is Paris.")


def make(tokenizer=TOKENIZER, *, clock=None, on_change=None, **request):
    """A generation of a prompt of ten tokens."""
    prompt = list(range(3, 13))
    request = make_request(**{"prompt_tokens": prompt, "seed": 7, "max_tokens": 99} | request)
    return Generation(request, prompt, tokenizer, clock=clock or Clock(), on_change=on_change)


def drawn(token):
    return Draw(token, -0.5, 1.0, math.inf, math.inf, math.inf)


def push(generation, tokens):
    """Push tokens until one of them ends it."""
    for token in tokens:
        if not generation.done:
            generation.push(drawn(token), TokenLogprob(token, -0.5, []))
    return generation


def taken(generation):
    """Its pieces as (text, tokens)."""
    pieces = []
    while piece := generation.take():
        pieces.append((piece.text, piece.tokens))
    return pieces


def test_every_piece_has_its_text_and_its_tokens():
    generation = push(make(max_tokens=4), PARIS)
    assert generation.result.tokens == PARIS[:4]
    assert generation.result.finish_reason == "length"
    pieces = taken(generation)
    assert [tokens for _, tokens in pieces] == [[token] for token in PARIS[:4]]
    assert "".join(text for text, _ in pieces) == TOKENIZER.decode(PARIS[:4])


def test_a_piece_ends_where_a_character_does():
    tokens = TOKENIZER.encode("a😀b")
    pieces = taken(push(make(), [*tokens, EOS_ID]))
    assert "".join(text for text, _ in pieces) == "a😀b"
    (emoji,) = [tokens for text, tokens in pieces if "😀" in text]
    assert len(emoji) >= 4  # a token for each byte


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_eos_ends_it_and_is_no_part_of_it_unless_ignored(ignore_eos):
    generation = push(make(ignore_eos=ignore_eos, max_tokens=3), [PARIS[0], EOS_ID, PARIS[1]])
    expected = [PARIS[0], EOS_ID, PARIS[1]] if ignore_eos else PARIS[:1]
    assert generation.result.tokens == expected
    assert generation.result.finish_reason == ("length" if ignore_eos else "stop")


def test_a_stop_string_ends_it_before_its_first_letter():
    generation = push(make(stop="France"), [*PARIS, EOS_ID])
    result = generation.result
    assert (result.response, result.finish_reason) == ("The capital of ", "stop")
    # The tokens that spelled it were generated, and are counted.
    assert result.tokens == PARIS[: len(result.tokens)]
    assert TOKENIZER.decode(result.tokens) == "The capital of France"
    assert result.usage == Usage(10, len(result.tokens), 10 + len(result.tokens), cached_tokens=0)
    assert "".join(text for text, _ in taken(generation)) == result.response


@pytest.mark.parametrize("ended_by", ["eos", "limit", "cancel"])
def test_what_was_held_back_is_let_out_at_the_end(ended_by):
    tokens = TOKENIZER.encode("I am here")
    limit = len(tokens) if ended_by == "limit" else 99
    generation = push(make(stop="here I am", max_tokens=limit), tokens[:-1])
    held = taken(generation)
    assert "her" not in "".join(text for text, _ in held)
    push(generation, tokens[-1:])
    if ended_by == "eos":
        generation.push(drawn(EOS_ID))
    if ended_by == "cancel":
        generation.finish("cancelled")
    assert generation.result.response == "I am here"
    pieces = held + taken(generation)
    assert "".join(text for text, _ in pieces) == "I am here"
    assert [token for _, tokens in pieces for token in tokens] == generation.result.tokens == tokens


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(3, TOKENIZER.vocab_size - 1), max_size=30),
    st.lists(st.text("aet n.\n", min_size=1, max_size=3), max_size=3),
    st.integers(1, 30),
)
def test_pieces_make_up_the_result_of_any_tokens(tokens, stops, limit):
    """Bytes that are no character among them: the text is that of all tokens at once, cut."""
    generation = push(make(stop=stops, max_tokens=limit), [*tokens, EOS_ID])
    result, pieces = generation.result, []
    while piece := generation.take():
        pieces.append(piece)
    assert result.tokens == tokens[: len(result.tokens)]
    text = TOKENIZER.decode(result.tokens)
    stopped = first_stop(text, stops) is not None
    assert result.response == text[: first_stop(text, stops)]
    assert len(result.tokens) == min(len(tokens), limit) or stopped
    assert result.finish_reason == ("stop" if stopped or len(tokens) < limit else "length")
    assert "".join(piece.text for piece in pieces) == result.response
    assert [token for piece in pieces for token in piece.tokens] == result.tokens


def test_without_a_tokenizer_ids_stand_for_the_text():
    generation = push(make(None, max_tokens=3), [5, 6, 7])
    assert generation.result.response is None
    assert taken(generation) == [("5", [5]), (",6", [6]), (",7", [7])]


def test_logprobs_come_with_the_pieces_of_their_tokens():
    tokens = TOKENIZER.encode("a😀b")
    generation = push(make(logprobs=0), [*tokens, EOS_ID])
    pieces = []
    while piece := generation.take():
        assert [logprob.token for logprob in piece.logprobs] == piece.tokens
        pieces += piece.logprobs
    assert pieces == generation.result.logprobs
    assert len(pieces) == len(tokens)


def test_logprobs_are_there_if_asked_for():
    result = push(make(), [*PARIS, EOS_ID]).result
    assert (result.logprobs, result.prompt_logprobs) == (None, None)
    generation = make(prompt_logprobs=True)
    new = [TokenLogprob(token, -1.0, []) for token in generation.prompt[1:]]
    generation.push_prompt_logprobs(new[:4])
    generation.push_prompt_logprobs(new[4:])
    assert push(generation, [EOS_ID]).result.prompt_logprobs == [None, *new]


def test_token_logprobs_of_one_column():
    """Two steps, three rows, two alternatives: the numbers say where they come from."""
    chosen = -np.arange(6.0).reshape(2, 3)
    top = -np.arange(12.0).reshape(2, 3, 2)
    logprobs = Logprobs(chosen, top, np.arange(12).reshape(2, 3, 2))
    assert token_logprobs(logprobs, 1, [40, 41], 2) == [
        TokenLogprob(40, -1.0, [(2, -2.0), (3, -3.0)]),
        TokenLogprob(41, -4.0, [(8, -8.0), (9, -9.0)]),
    ]
    assert token_logprobs(logprobs, 2, [40], 1) == [TokenLogprob(40, -2.0, [(4, -4.0)])]
    assert token_logprobs(logprobs, 0, [40], 0) == [TokenLogprob(40, 0.0, [])]


def test_its_reader_is_told_of_the_end_when_all_is_there():
    seen = []
    generation = make(
        max_tokens=2,
        on_change=lambda: seen.append((generation.done, generation.unread, generation.result)),
    )
    push(generation, PARIS[:2])
    assert seen == [(True, True, generation.result)]
    generation.changed()
    assert len(seen) == 2


def test_an_error_ends_it_without_a_result():
    seen = []
    generation = make(on_change=lambda: seen.append(generation.error))
    generation.push(drawn(PARIS[0]))
    error = ValueError("broken")
    generation.fail(error)
    assert (generation.done, generation.result, generation.error) == (True, None, error)
    assert generation.unread  # what came before can be read
    assert seen == [error]


def test_a_cancelled_one_goes_on_until_the_engine_knows():
    generation = make()
    generation.cancel()
    assert generation.cancelled
    assert not generation.done
    push(generation, PARIS[:2])
    generation.finish("cancelled")
    assert generation.result.finish_reason == "cancelled"
    assert generation.result.tokens == PARIS[:2]


def test_the_result_says_what_was_asked_for():
    request = {"temperature": 1.5, "top_k": 3, "stop": ("a", "b"), "logprobs": 2}
    generation = push(make(**request), [EOS_ID])
    result = generation.result
    assert result.parameters == generation.request.parameters
    assert dict(result.parameters).items() >= request.items()
    assert result.seed == 7
    assert result.prompt_tokens == list(range(3, 13))


def test_times_are_the_engines_own():
    """By hand: waits from 0 to 2, reads to 2.5, draws to 4.5; one second of compiling beside."""
    clock = Clock()
    generation = make(clock=clock, max_tokens=5)
    clock.worked_s, clock.compiled_s = 2.0, 1.0
    generation.begin(reused=4)
    clock.worked_s = 2.5
    generation.push(drawn(PARIS[0]))
    for worked, tokens in ((3.5, PARIS[1:3]), (4.5, PARIS[3:5])):
        clock.worked_s = worked
        push(generation, tokens)
    timings = dataclasses.asdict(generation.result.timings)
    assert timings.pop("queue_s") >= 0
    assert generation.result.usage.cached_tokens == 4
    assert timings == {
        "load_s": 0.0,
        "compile_s": 1.0,
        "prefill_s": 0.5,
        "decode_s": 2.0,
        "prefill_tokens_per_s": 12.0,  # of 10, 4 were there
        "decode_tokens_per_s": 2.0,  # 4 behind the first
    }


def test_times_of_one_that_never_began():
    generation = make()
    generation.finish("cancelled")
    timings = generation.result.timings
    assert timings.prefill_tokens_per_s is timings.decode_tokens_per_s is None
    assert (timings.prefill_s, timings.decode_s) == (0, 0)
    assert generation.result.usage.cached_tokens == 0
