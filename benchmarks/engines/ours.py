"""This project, through the programs that a user's requests run."""

import importlib.metadata
import time
from typing import Any

import jax
import numpy as np

from benchmarks.engines import protocol
from benchmarks.programs import draw_tokens, greedy, read_prompt, set_rows
from benchmarks.weights import make_weights
from llama_jax.config import ModelConfig
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import choose_plan
from llama_jax.decode.state import DecodeState
from llama_jax.llama import Llama


class Ours:
    """The engine; see `protocol.serve`."""

    def load(
        self, config: dict, dtype: str, contexts: dict[str, int], checkpoint: str | None, **_: Any
    ) -> dict[str, Any]:
        """Make or read the weights.

        Args:
            config: fields of the ModelConfig.
            dtype: of weights and cache.
            contexts: tokens a row must hold, by batch.
            checkpoint: a folder of weights; None: random ones.
        """
        self.config = ModelConfig.from_dict(config, source="the benchmark's request")
        self.dtype = dtype
        self.contexts = {int(batch): context for batch, context in contexts.items()}
        began = time.perf_counter()
        self.weights = make_weights(self.config, dtype, checkpoint)
        seconds = time.perf_counter() - began
        self.executors: dict[int, Executor] = {}
        self.batch, self.state = 0, None
        self.llama: Llama | None = None
        return {
            "load_s": seconds,
            "version": f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}",
            "plan": choose_plan(self.config, dtype)._asdict(),
        }

    def start(self, tokens: int, context: int, batch: int) -> float:
        """Prefill and decode once; return the seconds that compiling for it took.

        What a user waits for at the first request; timed in a process that compiled nothing yet.
        """
        self.prefill(tokens)
        self.decode(context, batch, new_tokens=1)
        return sum(executor.compiled.seconds for executor in self.executors.values())

    def programs(self) -> list[str]:
        """Return the programs compiled so far."""
        return [
            f"batch {batch}: {name}"
            for batch, executor in self.executors.items()
            for name in executor.compiled.names
        ]

    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt to its first token, on the host."""
        run = self._use(1)
        prompt = protocol.prompt(tokens, self.config.vocab_size)
        began = time.perf_counter()
        self.state = read_prompt(run, self._take_state(), prompt)
        return time.perf_counter() - began

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Return the seconds of `new_tokens` further tokens per row, all read by the host."""
        run = self._use(batch)
        state = set_rows(run, self._take_state(), context, new_tokens)
        began = time.perf_counter()
        self.state = draw_tokens(run, state, context, new_tokens, run.plan.max_in_flight)
        return time.perf_counter() - began

    def streaming(self, tokens: int, new_tokens: int) -> dict[str, float]:
        """Return the seconds of one greedy request in three ways.

        `stream` reads each piece of text as it comes, `generate` returns it whole, `programs` runs
        the same programs with nothing in between and reads all tokens at the end.
        """
        self.batch, self.state = 0, None
        prompt = protocol.prompt(tokens, self.config.vocab_size)
        request = {
            "prompt_tokens": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        cold = self.llama is None
        llama = self.llama = self.llama or Llama(
            self.weights, context=tokens + new_tokens, reuse=False
        )

        def stream() -> None:
            for _ in llama.stream(**request):
                pass

        ways = {
            "stream": stream,
            "generate": lambda: llama.generate(**request),
            "programs": lambda: _programs_alone(llama.executor, prompt, new_tokens),
        }
        if cold:
            for run in ways.values():
                run()
        seconds = dict.fromkeys(ways, 0.0)
        for way in (*ways, *reversed(ways)):  # there and back: a drift of the machine cancels
            began = time.perf_counter()
            ways[way]()
            seconds[way] += (time.perf_counter() - began) / 2
        return seconds

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of this process, and of the device if it has its own."""
        stats = jax.devices()[0].memory_stats() or {}
        peaks = {"process_bytes": protocol.peak_rss()}
        if "peak_bytes_in_use" in stats:
            peaks["device_bytes"] = stats["peak_bytes_in_use"]
        return peaks

    def _use(self, batch: int) -> Executor:
        """Return the executor of a batch; only the last one used keeps a state."""
        if batch != self.batch:
            self.batch, self.state = batch, None
        if batch not in self.executors:
            self.executors[batch] = Executor(
                self.config,
                self.weights.params,
                self.dtype,
                batch=batch,
                context=self.contexts[batch],
            )
        return self.executors[batch]

    def _take_state(self) -> DecodeState:
        """Return the state to hand over to a program, which consumes it."""
        state, self.state = self.state, None
        return self.executors[self.batch].init_state() if state is None else state


def _programs_alone(run: Executor, prompt: list[int], new_tokens: int) -> None:
    """Answer a greedy request, all dispatched before any token is read."""
    state = run.admit(run.init_state(), 0, greedy(run, prompt, new_tokens))
    state, first = run.prefill(state, 0, prompt)
    drawn = [first.tokens]
    for position in range(len(prompt), len(prompt) + new_tokens - 1, run.plan.decode_steps):
        state, more, _ = run.decode(state, [0], position)
        drawn.append(more.tokens)
    for tokens in drawn:
        np.asarray(tokens)


if __name__ == "__main__":
    protocol.serve(Ours())
