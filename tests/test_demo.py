"""The demo model: what its training sees, and what it answers."""

import random
import subprocess
import sys
import types

import pytest

from tests.helpers import ROOT
from tools import evaluate_demo
from tools.demo_corpus import REFUSAL, read_corpus, read_held_back
from tools.demo_phrasing import normal, style
from tools.demo_questions import Questions


@pytest.fixture(scope="module")
def corpus():
    return read_corpus()


def test_no_held_back_question_is_trained_on(corpus):
    paraphrases, unknown = read_held_back()
    held_back = {normal(text) for text in [*(question for question, _ in paraphrases), *unknown]}
    questions = Questions(corpus, held_back)
    assert not held_back & {normal(text) for own in questions.own for text in own}
    assert not held_back & {normal(text) for texts in questions.variants for text in texts}
    rng = random.Random(0)
    assert not held_back & {normal(questions.draw(rng, 0.5)[0]) for _ in range(20_000)}


def test_held_back_answers_are_in_the_corpus(corpus):
    answers = {answer for _, answer in corpus.questions}
    paraphrases, unknown = read_held_back()
    assert len(paraphrases) >= 200
    assert {answer for _, answer in paraphrases} <= answers
    assert len(unknown) >= 100
    assert REFUSAL not in answers


def test_a_question_has_one_answer(corpus):
    questions = Questions(corpus)
    owner = {}
    for i, texts in enumerate(questions.own):
        for text in [*texts, *questions.variants[i]]:
            assert owner.setdefault(normal(text), i) == i, text


def test_a_refused_question_is_not_in_the_corpus(corpus):
    questions = Questions(corpus)
    known = {normal(text) for own in questions.own for text in own}
    rng = random.Random(1)
    refused = [questions._unknown(rng) for _ in range(5_000)]
    assert not known & {normal(text) for text in refused}


def test_style_keeps_the_words():
    rng = random.Random(0)
    texts = {style("What is JAX?", rng) for _ in range(200)}
    assert {"what is jax", "What is JAX", "What is JAX?"} <= texts
    assert {normal(text) for text in texts} == {"what is jax"}


def test_suggested_questions_are_those_of_the_page_the_readme_and_the_quickstart(corpus):
    suggested = evaluate_demo.suggested_questions(corpus)
    assert {"Who are you?", "Tell me a story about a llama."} <= set(suggested)
    assert {"What is the capital of France?", "What is the capital of Japan?"} <= set(suggested)


def test_any_tale_of_the_corpus_answers_the_question_for_a_story(corpus, monkeypatch):
    monkeypatch.setattr(evaluate_demo, "SEEDS", 1)
    right = {request["prompt"]: answers for request, answers in evaluate_demo.suggested(corpus)}
    assert len(right[evaluate_demo.ANY_TALE]) == 6
    assert all(len(answers) == 1 for text, answers in right.items() if text != "Tell me a story.")


def test_a_model_below_a_threshold_is_reported(monkeypatch, capsys):
    answers = types.SimpleNamespace(response=REFUSAL)
    llm = types.SimpleNamespace(generate_all=lambda requests: (answers for _ in requests))
    monkeypatch.setattr(evaluate_demo.Llama, "load", lambda *_, **__: llm)
    monkeypatch.setattr(evaluate_demo, "SEEDS", 1)
    with pytest.raises(SystemExit, match="missed: suggested, names, case and punctuation, paraph"):
        evaluate_demo.main([])
    assert (
        "unknown                   100 of  100  100.0%  (at least 90%)" in capsys.readouterr().out
    )


@pytest.mark.slow
def test_the_embedded_model_meets_every_threshold():
    command = [sys.executable, "-m", "tools.evaluate_demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
