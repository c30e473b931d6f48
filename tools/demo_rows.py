"""Rows of token ids to train the demo model on: conversations, and what is the model's to say."""

import random
from collections.abc import Iterator

from llama_jax.text.chat import Message, encode_dialog
from llama_jax.text.tokenizer import BOS_ID, EOS_ID, Tokenizer
from tools.demo_corpus import Corpus
from tools.demo_questions import Questions

GREETINGS = [
    "My name is {}.",
    "My name is {}.",
    "my name is {}",
    "Hi, my name is {}.",
    "Hello! My name is {}.",
    "I am {}.",
    "I'm {}.",
    "Call me {}.",
    "You can call me {}.",
    "Please call me {}.",
]
RECALLS = [
    "What is my name?",
    "What is my name?",
    "what is my name",
    "What's my name?",
    "Do you remember my name?",
    "Do you know my name?",
    "Tell me my name.",
    "Say my name.",
    "What am I called?",
    "Which name did I give you?",
    "What name did I tell you?",
    "Can you repeat my name?",
    "And my name?",
]


def greeting_answer(name: str) -> str:
    """Return the answer to a user who gives a name."""
    return f"Nice to meet you, {name}!"


def recall_answer(name: str) -> str:
    """Return the answer to a user who wants to hear the name."""
    return f"Your name is {name}."


class Examples:
    """An endless source of rows."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, held_back: list[str]):
        self.corpus, self.tokenizer = corpus, tokenizer
        self.questions = Questions(corpus, held_back)
        self.dialogues = [
            dialogue[: i + 1]
            for dialogue in corpus.dialogues
            for i, message in enumerate(dialogue)
            if message["role"] == "assistant"
        ]

    def answer(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Return (prompt ids, answer ids) of a dialogue that ends with the assistant."""
        prompt = encode_dialog(messages[:-1], self.tokenizer)
        return prompt, [*self.tokenizer.encode(messages[-1]["content"]), EOS_ID]

    def rows(
        self, rng: random.Random, length: int, refused: float
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield rows for ever; a share `refused` of the questions has no answer."""
        while True:
            ids, said = [], []
            kind = rng.random()
            if kind < 0.03:
                ids = [BOS_ID, *self.tokenizer.encode(rng.choice(self.corpus.tales)), EOS_ID]
                said = [False] + [True] * (len(ids) - 1)
            elif kind < 0.2:
                prompt, target = self.answer(rng.choice(self.dialogues))
                ids, said = prompt + target, [False] * len(prompt) + [True] * len(target)
            elif kind < 0.4:
                ids, said = self._turns(self._named(rng, refused))
            while len(ids) < length:
                more, learnt = self._turns([self.questions.draw(rng, refused)])
                if rng.random() < 0.5:  # no chat goes on after it: EOS without a space
                    more, learnt = more[:-2] + more[-1:], [*learnt[:-2], True]
                ids, said = ids + more, said + learnt
            yield ids[:length], said[:length]

    def _named(self, rng: random.Random, refused: float) -> list[tuple[str, str]]:
        """Return a dialogue of someone who gives a name, and later wants to hear it."""
        name = rng.choice(self.corpus.names)
        between = [self.questions.draw(rng, refused) for _ in range(rng.randint(0, 3))]
        return [
            (rng.choice(GREETINGS).format(name), greeting_answer(name)),
            *between,
            (rng.choice(RECALLS), recall_answer(name)),
        ]

    def _turns(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Return the ids of a chat's history: its answers end with a space, which is not learnt."""
        ids, said = [], []
        for question, answer in turns:
            prompt = encode_dialog([Message(role="user", content=question)], self.tokenizer)
            target = [*self.tokenizer.encode(f"{answer} "), EOS_ID]
            ids += prompt + target
            said += [False] * len(prompt) + [True] * (len(target) - 2) + [False] * 2
        return ids, said
