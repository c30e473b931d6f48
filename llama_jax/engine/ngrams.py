"""Ngrams: drafts from the text itself. What followed its last tokens before may follow again.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), over prompt and output.
"""

import weakref
from collections.abc import Iterable, Sequence

from llama_jax.engine.drafter import Drafter
from llama_jax.engine.generation import Generation
from llama_jax.engine.slots import Slot

LENGTHS = 4, 3, 2
"""How many last tokens are looked up, the most telling first."""


class NgramIndex:
    """A text that grows, and where each run of LENGTHS tokens was last followed by another."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the text."""
        text = self._text
        for token in tokens:
            for length in LENGTHS:
                if length <= len(text):
                    self._after[tuple(text[-length:])] = len(text)
            text.append(token)

    def draft(self, count: int) -> list[int]:
        """Return at most so many tokens that followed the last ones before.

        A text that repeats itself goes on to do so: drafts are copied from drafts, too.
        """
        text = self._text
        for length in LENGTHS:
            if (start := self._after.get(tuple(text[-length:]))) is not None:
                drafts: list[int] = []
                for place in range(start, start + count):
                    beyond = place - len(text)
                    drafts.append(text[place] if beyond < 0 else drafts[beyond])
                return drafts
        return []


class NgramDrafter(Drafter):
    """Draft each slot's next tokens from its own prompt and output."""

    is_free = True
    expected_rate = 0.25

    def __init__(self) -> None:
        self._indices: weakref.WeakKeyDictionary[Generation, NgramIndex]
        self._indices = weakref.WeakKeyDictionary()

    def draft(self, slots: Sequence[Slot], count: int) -> list[list[int]]:
        """Return at most so many next tokens of each slot; see `Drafter`."""
        return [self._index(slot).draft(count) for slot in slots]

    def reset(self) -> None:
        """Forget the texts."""
        self._indices.clear()

    def _index(self, slot: Slot) -> NgramIndex:
        """Return the index of a slot's text, up to its last token."""
        generation = slot.generation
        assert generation is not None
        index = self._indices.setdefault(generation, NgramIndex())
        if not len(index):
            index.extend(generation.prompt)
        index.extend(generation.tokens[len(index) - len(generation.prompt) :])
        return index
