"""Prompts of an exact length, none of which another's cache could help, unless it is to."""

import dataclasses
import random

SPECIAL = 3
"""Ids below this are the vocabulary's special tokens."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request: what to read, how much to draw."""

    tokens: list[int]
    new_tokens: int


class Prompts:
    """Make prompts of random ids.

    No two of one object begin with the same token, as far as the vocabulary goes: a server that
    keeps what it has read gains nothing by it.

    Args:
        vocab_size: of the model.
        seed: other ones for another seed.
    """

    def __init__(self, vocab_size: int, seed: int = 0):
        self._vocab_size, self._random = vocab_size, random.Random(seed)
        self._firsts = list(range(SPECIAL, vocab_size))
        self._random.shuffle(self._firsts)
        self._made = 0

    def make(self, count: int, length: int, new_tokens: int, *, shared: int = 0) -> list[Prompt]:
        """Return some prompts.

        Args:
            count: how many.
            length: of each, in tokens.
            new_tokens: to draw for each.
            shared: tokens with which all of them begin.
        """
        common = self._ids(shared)
        return [Prompt(common + self._ids(length - shared), new_tokens) for _ in range(count)]

    def _ids(self, length: int) -> list[int]:
        if length == 0:
            return []
        first = self._firsts[self._made % len(self._firsts)]
        self._made += 1
        rest = self._random.choices(range(SPECIAL, self._vocab_size), k=length - 1)
        return [first, *rest]
