"""Executor: a model's compiled programs at fixed sizes, each compiled once and timed.

A program is named by its rows, its tokens per row and its bucket (cache slots attention reads).
Requests choose between them on the host; nothing else about a request ever compiles.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling
from llama_jax.decode import state as decode_state
from llama_jax.decode import steps as decode
from llama_jax.decode.plan import Plan, choose_plan
from llama_jax.decode.state import Admission, DecodeState
from llama_jax.decode.steps import Logprobs, StepOutputs
from llama_jax.nn import attention
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Params, Transformer


@dataclasses.dataclass
class CompileLog:
    """What was compiled: names like `prefill(16, 512)`, and seconds spent."""

    names: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Executor:
    """Compile and call the functions of `decode.py` and `decode_state.py` for one set of weights.

    Args:
        config: the model's shape.
        params: its parameters, of one dtype.
        dtype: the run's: of weights and cache, unless the plan holds them otherwise.
        batch: rows that decode together; fixed, since it may decide the bits of a row's logits.
        context: tokens of prompt plus output that a row can hold, at most `config.max_seq_len`.
        plan: how to compute; None: as `choose_plan` says.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: str,
        *,
        batch: int = 1,
        context: int,
        plan: Plan | None = None,
    ):
        self.config, self.batch, self.context = config, batch, context
        self.plan = plan = plan or choose_plan(config, dtype)
        self.params = jax.tree.map(lambda a: jnp.asarray(a, plan.weights), params)
        # Two blocks at least: attention's loop of one turn is compiled as no loop, to other bits.
        blocks = -(-self.padded(context) // attention.BLOCK)
        self.capacity = max(2, blocks) * attention.BLOCK
        self.compiled = CompileLog()
        self._programs: dict[str, Any] = {}
        self._model = Transformer(config, jnp.dtype(plan.weights), plan.kernels)

    def padded(self, length: int) -> int:
        """Return the slots that hold `length` tokens prefilled in chunks.

        A prefill size, or a multiple of the last: chunks with their padding never cross the end.
        """
        for size in self.plan.prefill_sizes:
            if length <= size:
                return size
        return -(-length // self.plan.prefill_sizes[-1]) * self.plan.prefill_sizes[-1]

    def chunks(self, length: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Cut the prompt's tokens from `start` to `length` into chunks: yield (start, size).

        A chunk has the smallest size that holds the rest, but lies at a multiple of its own size,
        so that with its padding it ends within the cache. `start` is a multiple of the plan's
        `reuse_multiple`: the cuts behind it are those of a prompt that is read from its beginning,
        unless they are free to be others.
        """
        while start < length:
            size = max(size for size in self.plan.prefill_sizes if start % size == 0)
            size = min(size, self.padded(length - start))
            yield start, size
            start += size

    def init_state(self) -> DecodeState:
        """Return a fresh state of idle rows."""
        return self._run("init_state", self._init_state, donate=())

    def admit(self, state: DecodeState, row: int, new: Admission) -> DecodeState:
        """See `decode_state.admit`; consumes `state`."""
        return self._run("admit", decode_state.admit, state, np.int32(row), new)

    def release(self, state: DecodeState, row: int) -> DecodeState:
        """See `decode_state.release`; consumes `state`."""
        return self._run("release", decode_state.release, state, np.int32(row))

    def copy_row(self, state: DecodeState, source: int, target: int) -> DecodeState:
        """See `decode_state.copy_row`; consumes `state`."""
        rows = np.int32(source), np.int32(target)
        return self._run("copy_row", decode_state.copy_row, state, *rows)

    def prefill_chunk(
        self, state: DecodeState, row: int, prompt: Sequence[int], start: int, size: int
    ) -> tuple[DecodeState, StepOutputs]:
        """Read one of the prompt's `chunks` into an admitted row; consumes `state`.

        Returns:
            The state, and one step of one column: after the last chunk, the first token.
        """
        chunk = self._chunk(prompt, start, size)
        length, last = self._extent(prompt, start, size)
        name, function = self._prefill(size, self._bucket(start + size))
        args = (self.params, state, np.int32(row), chunk, length, last)
        return self._run(name, function, *args, donate=1)

    def prefill_scored(
        self, state: DecodeState, row: int, prompt: Sequence[int], start: int, size: int
    ) -> tuple[DecodeState, StepOutputs, Logprobs]:
        """Read a chunk as `prefill_chunk`, with the logprobs of the tokens that follow each."""
        chunk, targets = (self._chunk(prompt, start + i, size) for i in (0, 1))
        length, last = self._extent(prompt, start, size)
        name, function = self._prefill(size, self._bucket(start + size), scored=True)
        args = (self.params, state, np.int32(row), chunk, length, last, targets)
        return self._run(name, function, *args, donate=1)

    def prefill(
        self, state: DecodeState, row: int, prompt: Sequence[int], start: int = 0
    ) -> tuple[DecodeState, StepOutputs]:
        """Read all chunks of a prompt into an admitted row; consumes `state`."""
        drawn = None
        for begin, size in self.chunks(len(prompt), start):
            state, drawn = self.prefill_chunk(state, row, prompt, begin, size)
        assert drawn is not None, "an empty prompt"
        return state, drawn

    def decode(
        self, state: DecodeState, rows: Sequence[int], longest: int
    ) -> tuple[DecodeState, StepOutputs, list[int]]:
        """Run the plan's `decode_steps` next steps of some rows; consumes `state`.

        Args:
            state: as returned before.
            rows: those to be decoded; of the others, which must be done, some or all are computed
                along.
            longest: the highest position among them.

        Returns:
            The state, what was drawn, and the row that each of its columns belongs to.
        """
        rows = self._decode_rows(rows)
        name, function = self._decode(len(rows), self._bucket(longest + self.plan.decode_steps))
        named = () if len(rows) == self.batch else (np.asarray(rows, np.int32),)
        state, drawn = self._run(name, function, self.params, state, *named, donate=1)
        return state, drawn, rows

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile all that a request can need; yield (done, of how many) after each program."""
        state = jax.eval_shape(self._init_state)
        one = np.int32(1)
        params = sampling.make_params()
        new = decode_state.make_admission(params, [0], self.config.vocab_size, limit=1)
        needed: list[tuple[str, Callable, Any, tuple[int, ...]]] = [
            ("init_state", self._init_state, (), ()),
            ("admit", decode_state.admit, (state, one, new), (0,)),
            ("release", decode_state.release, (state, one), (0,)),
            ("copy_row", decode_state.copy_row, (state, one, one), (0,)),
        ]
        for bucket in sorted({self._bucket(n) for n in range(1, self.capacity + 1)}):
            for size in (size for size in self.plan.prefill_sizes if size <= bucket):
                chunk = np.zeros(size, np.int32)
                args = (self.params, state, one, chunk, one, np.False_)
                needed.append((*self._prefill(size, bucket), args, (1,)))
                scored = self._prefill(size, bucket, scored=True)
                needed.append((*scored, (*args, chunk), (1,)))
            for count in sorted(
                {len(self._decode_rows(range(n))) for n in range(1, self.batch + 1)}
            ):
                rows = () if count == self.batch else (np.arange(count, dtype=np.int32),)
                needed.append((*self._decode(count, bucket), (self.params, state, *rows), (1,)))
        for done, (name, function, args, donate) in enumerate(needed, start=1):
            self._compile(name, function, args, donate)
            yield done, len(needed)

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the float32 logits [T, V] after each token of a text."""
        sizes = (self.config, 1, self.capacity, self.plan.cache)
        cache = self._run("init_cache", lambda: kv.init_cache(*sizes), donate=())
        rows = []
        for start, size in self.chunks(len(tokens)):
            attend_len = self._bucket(start + size)
            cache, logits = self._run(
                f"score({size}, {attend_len})",
                functools.partial(decode.score, self._model, attend_len=attend_len),
                self.params,
                cache,
                np.int32(start),
                self._chunk(tokens, start, size),
                donate=1,
            )
            rows.append(np.asarray(logits)[: len(tokens) - start])
        return np.concatenate(rows)

    def _init_state(self) -> DecodeState:
        return decode_state.init_state(self.config, self.batch, self.capacity, self.plan.cache)

    def _prefill(self, size: int, attend_len: int, *, scored: bool = False) -> tuple[str, Callable]:
        function = decode.prefill_scored if scored else decode.prefill
        function = functools.partial(function, self._model, attend_len=attend_len)
        return f"prefill{'_scored' * scored}({size}, {attend_len})", function

    def _decode(self, rows: int, attend_len: int) -> tuple[str, Callable]:
        steps = self.plan.decode_steps
        function = functools.partial(
            decode.decode, self._model, num_steps=steps, attend_len=attend_len
        )
        return f"decode({rows}, {steps}, {attend_len})", function

    def _decode_rows(self, rows: Sequence[int]) -> list[int]:
        """Return the rows to compute: all, unless a row's bits are its own whatever the batch."""
        if not self.plan.batch_invariant:
            return list(range(self.batch))
        count = min(self.batch, 1 << (len(rows) - 1).bit_length())  # few programs, not one for each
        others = (row for row in range(self.batch) if row not in rows)
        rows = [*rows, *itertools.islice(others, count - len(rows))]
        return sorted(rows) if count == self.batch else rows

    @staticmethod
    def _chunk(tokens: Sequence[int], start: int, size: int) -> np.ndarray:
        """Cut out tokens, padded on the right."""
        part = np.asarray(tokens[start : start + size], np.int32)
        return np.pad(part, (0, size - len(part)))

    @staticmethod
    def _extent(prompt: Sequence[int], start: int, size: int) -> tuple[np.int32, np.bool_]:
        """Return how many of a chunk's tokens are the prompt's, and whether the last is."""
        return np.int32(min(size, len(prompt) - start)), np.bool_(start + size >= len(prompt))

    def _bucket(self, length: int) -> int:
        """Return the slots to attend to: two blocks, four, eight ..., or all there are."""
        if not self.plan.by_bucket:
            return self.capacity
        bucket = 2 * attention.BLOCK
        while bucket < length:
            bucket *= 2
        return min(bucket, self.capacity)

    def _run(
        self, name: str, function: Callable, *args: Any, donate: int | tuple[int, ...] = 0
    ) -> Any:
        """Call a function through its executable, compiled at first use."""
        if name not in self._programs:
            self._compile(name, function, args, donate)
        return self._programs[name](*args)

    def _compile(
        self, name: str, function: Callable, args: Any, donate: int | tuple[int, ...]
    ) -> None:
        if name in self._programs:
            return
        began = time.perf_counter()
        self._programs[name] = jax.jit(function, donate_argnums=donate).lower(*args).compile()
        self.compiled.names.append(name)
        self.compiled.seconds += time.perf_counter() - began
