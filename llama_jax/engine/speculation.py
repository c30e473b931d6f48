"""Speculation: which drafts a turn verifies, and what came of them.

Drafts are verified where they are likely to be accepted and to save time; else slots decode as
without speculation. Where bits may depend on the program, all tokens come from one.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.decode.executor import Executor
from llama_jax.engine.clock import Clock
from llama_jax.engine.counts import Counts
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.generation import Generation
from llama_jax.engine.pace import Pace, Rate
from llama_jax.engine.slots import Slot


class Window(NamedTuple):
    """What a pass verifies."""

    width: int
    """Tokens of each slot: the last one and its drafts."""
    drafts: dict[int, list[int]]
    """Of each slot that decodes, by its index; at most `width` - 1."""


class Speculation:
    """Choose what each turn verifies, and learn from it; not thread-safe.

    Args:
        executor: its plan speculates.
        drafter: what proposes tokens.
        clock: the engine's.
        counts: the engine's.
    """

    def __init__(
        self,
        executor: Executor,
        drafter: Drafter,
        clock: Clock,
        counts: Counts,
    ):
        self.drafter = drafter
        self._executor, self._clock, self._counts = executor, clock, counts
        self._pace = Pace(is_free=drafter.is_free, eager=drafter.is_eager)
        self._rates: weakref.WeakKeyDictionary[Generation, Rate] = weakref.WeakKeyDictionary()
        self._drafts: dict[Generation, list[int]] = {}
        """Of this turn, those that are not verified included."""
        self._window: Window | None = None
        self._began, self._count, self._chosen = 0.0, 0, 1

    def choose(self, slots: Sequence[Slot]) -> Window | None:
        """Return what to verify of slots that decode; None: they decode without drafts."""
        self._clock.update()
        self._began = self._clock.worked_s
        plan, sizes = self._executor.plan, self._executor.sizes
        self._count = len(sizes.decode_slots([slot.index for slot in slots]))
        windows = sizes.windows(self._count)
        is_fixed = not plan.batch_invariant
        rates = [self._rate(slot) for slot in slots]
        most = plan.draft_tokens
        if self.drafter.is_free:
            drafts = self.drafter.draft(slots, most) if windows else [[] for _ in slots]
            lengths = list(map(len, drafts))
            chosen = self._pace.choose(self._count, windows, rates, lengths)
            chosen = windows[-1] if is_fixed else chosen
        else:
            chosen = self._pace.choose(self._count, windows, rates, [most] * len(slots))
            drafts = self.drafter.draft(slots, chosen - 1) if chosen > 1 else [[] for _ in slots]
        drafts = [_useful(slot, own) for slot, own in zip(slots, drafts, strict=True)]
        self._chosen = chosen
        generations = [slot.generation for slot in slots]
        self._drafts = {g: own for g, own in zip(generations, drafts, strict=True) if g is not None}
        width = windows[-1] if is_fixed else chosen
        self._window = None
        if width > 1:
            own = zip(slots, drafts, strict=True)
            self._window = Window(width, {slot.index: d[: width - 1] for slot, d in own})
        return self._window

    def observe(self, generation: Generation, tokens: Sequence[int]) -> None:
        """Learn from what was drawn of this turn, before the generation gets it."""
        drafts = self._drafts.get(generation)
        if drafts is None:  # its first token, of which nothing was drafted
            return
        width = 0 if self._window is None else self._window.width
        verified = drafts[: max(0, width - 1)]
        accepted = _common(verified, tokens)
        passes = 1 if self._window else len(tokens)
        generation.count_passes(len(verified), accepted, passes, len(tokens))
        self._counts.count_passes(len(verified), accepted, passes, len(tokens))
        rate = self._rates[generation]
        # What was drafted and not verified is compared as well. A window may end by its width.
        known = drafts if self._window is None else verified
        if known:
            rate.observe(_common(known, tokens), len(known))
        else:
            rate.forget()

    def end(self, steps: int) -> None:
        """Note how long the turn took, with what it handed over: a pass, or some steps."""
        seconds = self._clock.worked_s - self._began
        passes = 1 if self._window else steps
        self._pace.observe(self._count, self._chosen, seconds / passes)
        self._drafts, self._window = {}, None

    def reset(self) -> None:
        """Forget what the drafter holds, after a failure."""
        self._drafts, self._window = {}, None
        self.drafter.reset()

    def _rate(self, slot: Slot) -> Rate:
        assert slot.generation is not None
        rate = self._rates.get(slot.generation)
        if rate is None:
            rate = self._rates[slot.generation] = Rate(self.drafter.expected_rate)
        return rate


def _useful(slot: Slot, drafts: list[int]) -> list[int]:
    """Return those drafts that `max_tokens` has room for, with the token after them."""
    assert slot.generation is not None
    if slot.is_dirty:
        return []
    return drafts[: max(0, slot.generation.max_tokens - len(slot.generation.tokens) - 1)]


def _common(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many first drafts equal the tokens."""
    count = 0
    for draft, token in zip(drafts, tokens, strict=False):
        if draft != token:
            break
        count += 1
    return count
