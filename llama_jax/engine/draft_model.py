"""DraftModel: drafts by a small model of the same vocabulary.

It draws by each request's own law, with the noise of the same seed and step, so it agrees with the
large model more often than its likeliest tokens do. It has slots of its own, on one device.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llama_jax.decode import sampling
from llama_jax.decode.compiled import CompileLog
from llama_jax.decode.draft import LAST
from llama_jax.decode.executor import Executor
from llama_jax.decode.needs import together
from llama_jax.decode.state import DecodeState, make_admission
from llama_jax.decode.warm_up import DRAFT_NEEDS, drafting_programs
from llama_jax.decode.window_programs import Draft, Text
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.generation import Generation
from llama_jax.engine.parameters import sampling_params
from llama_jax.engine.slots import Slot
from llama_jax.jax_settings import to_host


@dataclasses.dataclass
class _Held:
    """What one slot of the small model has."""

    generation: Generation | None = None
    """Whose law it draws by."""
    cached: list[int] = dataclasses.field(default_factory=list)
    """The tokens that its cache holds, some drafts at the end included."""
    num_counted: int = 0
    """Tokens of the output that its penalties count."""


class DraftModel(Drafter):
    """Draft by a small model.

    Args:
        executor: the small model's, with as many slots as the large one's, whose plan has the same
            `draft_tokens`. Its context may be shorter: beyond it nothing is drafted.
    """

    expected_rate = 0.7

    def __init__(self, executor: Executor):
        self._executor = executor
        self._state: DecodeState | None = None
        self._held = [_Held() for _ in range(executor.batch)]
        self._programs = list(drafting_programs(executor.sizes))
        self.num_programs = len(self._programs)

    @property
    def compiled(self) -> Sequence[CompileLog]:
        """Of the small model's executor."""
        return [self._executor.compiled]

    def draft(self, slots: Sequence[Slot], count: int) -> list[list[int]]:
        """Return so many next tokens of each slot; none for a text that leaves no room."""
        texts = {slot.index: text for slot in slots if (text := self._text(slot, count))}
        if not texts:
            return [[] for _ in slots]
        sizes = self._executor.sizes
        computed = sizes.decode_slots(list(texts))
        longest = max(len(text.tokens) for text in texts.values())
        needs = together(slot.needs for slot in slots)
        program = Draft(
            len(computed), count, sizes.bucket(longest + count), DRAFT_NEEDS[needs.noise]
        )
        values = computed, [texts.get(index) for index in computed]
        state, self._state = self._take_state(), None
        self._state, drafts = self._executor.call(program, self._executor.params, state, *values)
        columns = dict(zip(computed, np.transpose(to_host(drafts)).tolist(), strict=True))
        for index, text in texts.items():
            self._held[index].cached = [*text.tokens, *columns[index][:-1]]
        return [columns[slot.index] if slot.index in texts else [] for slot in slots]

    def allocate(self) -> None:
        """Allocate the caches."""
        self._state = jax.block_until_ready(self._take_state())

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile all programs; yield (done, total) after each."""
        return self._executor.warm_up(self._programs)

    def reset(self) -> None:
        """Forget what the slots hold, and the state that a failed call has consumed."""
        self._state = None
        self._held = [_Held() for _ in self._held]

    def _text(self, slot: Slot, count: int) -> Text | None:
        """Return a slot's text, whose beginning the cache then holds; None: there is no room."""
        generation, held = slot.generation, self._held[slot.index]
        assert generation is not None
        tokens = [*generation.prompt, *generation.tokens]
        if len(tokens) + count > self._executor.context:
            return None
        drawn = len(generation.tokens)
        is_near = (
            held.generation is generation
            and drawn - held.num_counted <= count + 1
            and held.cached[: len(tokens) - LAST] == tokens[:-LAST]
        )
        if not is_near:
            self._read(slot, generation, tokens)
            held.num_counted = drawn
        uncounted = generation.tokens[held.num_counted :]
        held.generation, held.num_counted = generation, drawn
        return Text(tokens, drawn, uncounted)

    def _read(self, slot: Slot, generation: Generation, tokens: list[int]) -> None:
        """Read a text into a slot, but for the last token and what its cache holds."""
        executor, held = self._executor, self._held[slot.index]
        text, parameters = tokens[:-1], generation.request.parameters
        start = min(_common_len(held.cached, text), len(text) - 1)
        start -= start % executor.plan.reuse_multiple
        vocab_size = executor.config.vocab_size
        bias = sampling.make_bias(vocab_size, parameters.logit_bias, parameters.allowed_tokens)
        new = make_admission(
            sampling_params(parameters),
            generation.prompt,
            vocab_size,
            limit=1,
            stop_tokens=executor.config.eos_tokens,
            bias=bias,
            output=generation.tokens,
            start=start,
        )
        state, self._state = self._take_state(), None
        state = executor.admit(state, slot.index, new)
        for begin, size in executor.sizes.chunks(len(text), start):
            state, _ = executor.prefill_chunk(state, slot.index, text, begin, size)
        self._state = state

    def _take_state(self) -> DecodeState:
        return self._executor.init_state() if self._state is None else self._state


def _common_len(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two texts have in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
