"""Executor: a model's compiled programs at fixed sizes, each compiled once and timed.

A program is named by its chunk (tokens per row) and its bucket (cache slots attention reads).
Requests choose between them on the host; nothing else about a request ever compiles.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax import attention, decode
from llama_jax import cache as kv
from llama_jax.config import ModelConfig
from llama_jax.decode import DecodeState
from llama_jax.model import Llama, Params
from llama_jax.plan import Plan, choose_plan
from llama_jax.sampling import SamplingParams


@dataclasses.dataclass
class CompileLog:
    """What was compiled: names like `decode(8, 256)`, and seconds spent."""

    names: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Executor:
    """Compile and call the functions of `decode.py` for one set of weights.

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
        self._model = Llama(config, jnp.dtype(plan.weights), plan.forms)

    def padded(self, length: int) -> int:
        """Return the slots that hold `length` tokens prefilled in chunks.

        A prefill size, or a multiple of the last: chunks with their padding never cross the end.
        """
        for size in self.plan.prefill_sizes:
            if length <= size:
                return size
        return -(-length // self.plan.prefill_sizes[-1]) * self.plan.prefill_sizes[-1]

    def init_state(self) -> DecodeState:
        """Return a fresh state of idle rows."""
        sizes = (self.config, self.batch, self.capacity, self.plan.cache)
        return self._run("init_state", lambda: decode.init_state(*sizes), donate=())

    def admit(
        self, state: DecodeState, row: int, params: SamplingParams, limit: int, stop_token: int
    ) -> DecodeState:
        """See `decode.admit`; consumes `state`."""
        return self._run(
            "admit",
            decode.admit,
            state,
            np.int32(row),
            params,
            np.int32(limit),
            np.int32(stop_token),
        )

    def prefill(
        self, state: DecodeState, row: int, prompt: Sequence[int]
    ) -> tuple[DecodeState, Int[Array, "1 B"]]:
        """Read a whole prompt into an admitted row; consumes `state`.

        Returns:
            The state and each row's token: the first of `row`, NO_TOKEN for the others.
        """
        tokens = None
        for start, chunk, length in self._chunks(prompt):
            attend_len = self._bucket(start + len(chunk))
            last = start + length == len(prompt)
            state, tokens = self._run(
                f"prefill({len(chunk)}, {attend_len})",
                functools.partial(decode.prefill, self._model, attend_len=attend_len),
                self.params,
                state,
                np.int32(row),
                chunk,
                np.int32(length),
                np.bool_(last),
                donate=1,
            )
        assert tokens is not None, "an empty prompt"
        return state, tokens

    def decode(
        self, state: DecodeState, longest: int
    ) -> tuple[DecodeState, Int[Array, "num_steps B"]]:
        """Run the plan's `decode_steps` next steps of every row; consumes `state`.

        Args:
            state: as returned before.
            longest: the highest position among the rows that are active.
        """
        num_steps = self.plan.decode_steps
        attend_len = self._bucket(longest + num_steps)
        return self._run(
            f"decode({num_steps}, {attend_len})",
            functools.partial(
                decode.decode, self._model, num_steps=num_steps, attend_len=attend_len
            ),
            self.params,
            state,
            donate=1,
        )

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the float32 logits [T, V] after each token of a text."""
        sizes = (self.config, 1, self.capacity, self.plan.cache)
        cache = self._run("init_cache", lambda: kv.init_cache(*sizes), donate=())
        rows = []
        for start, chunk, length in self._chunks(tokens):
            attend_len = self._bucket(start + len(chunk))
            cache, logits = self._run(
                f"score({len(chunk)}, {attend_len})",
                functools.partial(decode.score, self._model, attend_len=attend_len),
                self.params,
                cache,
                np.int32(start),
                chunk,
                donate=1,
            )
            rows.append(np.asarray(logits)[:length])
        return np.concatenate(rows)

    def _chunks(self, tokens: Sequence[int]) -> list[tuple[int, np.ndarray, int]]:
        """Cut into (start, right-padded chunk, length without padding)."""
        chunks, size = [], self.plan.prefill_sizes[-1]
        for start in range(0, len(tokens), size):
            part = np.asarray(tokens[start : start + size], np.int32)
            padding = self.padded(len(part)) - len(part)
            chunks.append((start, np.pad(part, (0, padding)), len(part)))
        return chunks

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
            began = time.perf_counter()
            program = jax.jit(function, donate_argnums=donate).lower(*args).compile()
            self._programs[name] = program
            self.compiled.names.append(name)
            self.compiled.seconds += time.perf_counter() - began
        return self._programs[name](*args)
