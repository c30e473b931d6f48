"""Pipeline: the decode state on the device, and the calls in flight whose results are not read."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from llama_jax.decode.executor import Executor
from llama_jax.decode.needs import together
from llama_jax.decode.sampling import AnyArray
from llama_jax.decode.state import Admission, DecodeState
from llama_jax.decode.steps import MEASURES, Logprobs, StepOutputs, with_infinities
from llama_jax.engine.generation import Generation, token_logprobs
from llama_jax.engine.slots import Slot
from llama_jax.engine.speculation import Window
from llama_jax.jax_settings import copy_to_host_async, to_host


@dataclasses.dataclass
class Column:
    """Which generation a column of `StepOutputs` belongs to."""

    slot: Slot
    generation: Generation
    index: int


@dataclasses.dataclass
class PromptScores:
    """Log-probabilities of the tokens of a prompt's chunk."""

    generation: Generation
    logprobs: Logprobs
    targets: list[int]
    """The tokens that were scored."""

    def hand_over(self) -> None:
        """Give them to the generation."""
        count = self.generation.request.parameters.logprobs or 0
        logprobs = token_logprobs(self.logprobs, 0, self.targets, count)
        self.generation.push_prompt_logprobs(logprobs)


@dataclasses.dataclass
class InFlight:
    """Arrays that the device is computing, and whose they are."""

    tokens: AnyArray
    """[steps, columns]; no step where a prompt is scored and goes on."""
    measures: AnyArray
    """[steps, columns, 5]; see `steps.MEASURES`."""
    logprobs: Logprobs | None
    """Of the tokens; None: no column's are wanted."""
    columns: list[Column]
    replicas: set[int]
    """Those that compute them."""
    prompt_scores: PromptScores | None = None


class Pipeline:
    """Call the executor on one decode state, and read the results in order.

    Args:
        executor: what runs the programs. A call that fails has consumed the state: `reset` then
            starts anew.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._state: DecodeState | None = None
        self._in_flight: collections.deque[InFlight] = collections.deque()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in flight."""
        return not self._in_flight

    @property
    def is_full(self) -> bool:
        """Whether results must be read before the next call: a replica has enough in flight."""
        counts = collections.Counter(i for each in self._in_flight for i in each.replicas)
        return max(counts.values(), default=0) >= self._executor.plan.max_in_flight

    def allocate(self) -> None:
        """Allocate the state, whose caches are written whole, if there is none."""
        self._state = jax.block_until_ready(self._take_state())

    def reset(self) -> None:
        """Drop the state and what is in flight, after a failure."""
        self._state = None
        self._in_flight.clear()

    def admit(self, slot: Slot, new: Admission) -> None:
        """Give a slot to a request."""
        self._state = self._executor.admit(self._take_state(), slot.index, new)

    def copy_slot(self, source: Slot, target: Slot) -> None:
        """Copy the cache of one slot to another."""
        self._state = self._executor.copy_slot(self._take_state(), source.index, target.index)

    def clear_slot(self, slot: Slot) -> None:
        """Set the cache of a slot to zero."""
        self._state = self._executor.clear_slot(self._take_state(), slot.index)

    def release(self, slot: Slot) -> None:
        """End a slot's request on the device."""
        self._state = self._executor.release(self._take_state(), slot.index)

    def prefill_chunk(self, slot: Slot, generation: Generation, start: int, size: int) -> None:
        """Read one chunk of a prompt, and draw a token after the last; put what comes in flight."""
        prefix = generation.prefix
        self._state, chunk = self._executor.prefill_chunk(
            self._take_state(), slot.index, prefix, start, size
        )
        outputs, columns, scores = None, [], None
        if generation.request.parameters.prompt_logprobs:
            logprobs = self._executor.score(chunk, slot.index, prefix, start)
            targets = generation.prompt[start + 1 : start + size + 1]
            scores = PromptScores(generation, logprobs, targets)
        if start + size >= len(prefix):
            self._state, outputs = self._executor.first_token(
                self._take_state(), slot.index, chunk, slot.needs
            )
            columns = [Column(slot, generation, 0)]
        if outputs is not None or scores is not None:
            self._send(outputs, columns, {slot.replica}, scores)

    def verify(self, slots: list[Slot], window: Window) -> None:
        """Draw the next tokens of some slots as far as drafts equal them; put them in flight."""
        self._state, outputs, computed = self._executor.verify(
            self._take_state(),
            window.drafts,
            window.width,
            max(slot.position for slot in slots),
            together(slot.needs for slot in slots),
        )
        self._send(outputs, _columns(slots, computed), {slot.replica for slot in slots})

    def decode(self, slots: list[Slot], steps: int) -> None:
        """Run the next decode steps of some slots; put their results in flight."""
        longest = max(slot.position for slot in slots)
        indices = [slot.index for slot in slots]
        needs = together(slot.needs for slot in slots)
        self._state, outputs, computed = self._executor.decode(
            self._take_state(), indices, longest, needs, steps
        )
        self._send(outputs, _columns(slots, computed), {slot.replica for slot in slots})

    def receive(self) -> InFlight:
        """Wait for the oldest results in flight; return them with what was drawn on the host."""
        oldest = self._in_flight.popleft()
        oldest.tokens = to_host(oldest.tokens)
        oldest.measures = with_infinities(to_host(oldest.measures))
        return oldest

    def _send(
        self,
        outputs: StepOutputs | None,
        columns: list[Column],
        replicas: set[int],
        scores: PromptScores | None = None,
    ) -> None:
        """Put results in flight, and begin to copy what will be read of them."""
        tokens: AnyArray = np.empty((0, 0), np.int32)
        measures: AnyArray = np.empty((0, 0, len(MEASURES)), np.float32)
        logprobs = None
        if outputs is not None:
            tokens, measures = outputs.tokens, outputs.measures
            if any(column.slot.needs.logprobs for column in columns):
                logprobs = outputs.logprobs
        copy_to_host_async((tokens, measures, logprobs, scores and scores.logprobs))
        self._in_flight.append(InFlight(tokens, measures, logprobs, columns, replicas, scores))

    def _take_state(self) -> DecodeState:
        """Return the state for a call that consumes it."""
        state, self._state = self._state, None
        return self._executor.init_state() if state is None else state


def _columns(slots: Sequence[Slot], computed: Sequence[int]) -> list[Column]:
    """Return whose the columns of results are, given the slot of each."""
    return [
        Column(slot, slot.generation, computed.index(slot.index))
        for slot in slots
        if slot.generation is not None
    ]
