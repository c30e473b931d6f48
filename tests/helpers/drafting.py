"""Drafters that are right, wrong or in between, and requests for them."""

import random

from llama_jax.engine.draft_model import DraftModel
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.ngrams import NgramDrafter
from llama_jax.engine.request import make_request


class EagerNgrams(NgramDrafter):
    """All that the text proposes is verified."""

    is_eager = True


class EagerModel(DraftModel):
    """All that the model proposes is verified."""

    is_eager = True


class Scripted(Drafter):
    """Draft by a function of a generation and the number of drafts."""

    is_eager = True

    def __init__(self, script):
        self._script = script

    def draft(self, slots, count):
        return [self._script(slot.generation, count)[:count] for slot in slots]


def knowing(answers, accepted):
    """Draft what is known to come, so that so many drafts are accepted; then something else.

    Args:
        answers: the tokens that each prompt and seed are answered by.
        accepted: called for each window; how many drafts are to be right.
    """

    def script(generation, count):
        own = answers[tuple(generation.prompt), generation.request.parameters.seed]
        left = own[len(generation.tokens) :]
        right = min(accepted(), count)
        wrong = [left[right] ^ 1] if right < len(left) else [0]
        return [*left[:right], *(wrong * count)]

    return Scripted(script)


def at_random(vocab_size, seed=0):
    """Draft anything, of any length."""
    rng = random.Random(seed)
    return Scripted(
        lambda _, count: [rng.randrange(vocab_size) for _ in range(rng.randrange(count + 1))]
    )


def repeated():
    """Draft the last token over and over."""
    return Scripted(lambda g, count: [g.tokens[-1]] * count)


def mixed_requests(count, vocab_size, seed=0, longest=60, **fixed):
    """Requests of all kinds: greedy and drawn, filtered and penalised, in one text or repeated."""
    rng = random.Random(seed)
    return [
        make_request(
            **{
                "prompt_tokens": [
                    rng.randrange(vocab_size) for _ in range(rng.choice([1, 2, 7, 17, 40]))
                ]
                * rng.choice([1, 1, 3]),
                "max_tokens": rng.choice([1, 2, 3, rng.randrange(1, longest)]),
                "seed": rng.randrange(2**64),
                "temperature": rng.choice([0, 0, 0.2, 0.7, 1.5]),
                "top_p": rng.choice([None, 0.5, 0.9]),
                "top_k": rng.choice([None, 3, 40]),
                "min_p": rng.choice([0, 0, 0.1]),
                "repetition_penalty": rng.choice([1, 1, 0.8, 1.3]),
                "frequency_penalty": rng.choice([0, 0, 0.4]),
                "presence_penalty": rng.choice([0, 0, 0.6]),
                "logit_bias": rng.choice([None, {"5": 2.0, "9": -3.0}]),
                "logprobs": rng.choice([None, None, 0, 4]),
                "ignore_eos": rng.random() < 0.3,
                "stop": rng.choice([[], [], [f",{rng.randrange(vocab_size)},"]]),
            }
            | fixed
        )
        for _ in range(count)
    ]
