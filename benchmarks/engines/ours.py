"""This project, through the programs that a user's requests run."""

import importlib.metadata
import time
from typing import Any

import jax

from benchmarks import programs
from benchmarks.engines import protocol
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
        """Make or read the weights."""
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

    def start(self, requests: list[dict[str, int]]) -> float:
        """Run some requests; return the seconds that compiling for them took.

        What a user waits for at the first request; timed in a process that compiled nothing yet.
        """
        for request in requests:
            self.prefill(**request) if "tokens" in request else self.decode(**request)
        return sum(executor.compiled.seconds for executor in self.executors.values())

    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt to its first token, on the host."""
        run, state = self._take(1)
        prompt = protocol.prompt(tokens, self.config.vocab_size)
        self.state, seconds = programs.time_prefill(run, state, prompt)
        return seconds

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Return the seconds of `new_tokens` further tokens per slot, all read by the host."""
        run, state = self._take(batch)
        self.state, seconds = programs.time_decode(run, state, context, new_tokens)
        return seconds

    def streaming(self, tokens: int, new_tokens: int) -> dict[str, float]:
        """Return the seconds of one greedy request: read piece by piece, and returned whole."""
        self.batch, self.state = 0, None
        prompt = protocol.prompt(tokens, self.config.vocab_size)
        request: dict[str, Any] = {"prompt_tokens": prompt, "max_tokens": new_tokens}
        request |= {"temperature": 0, "ignore_eos": True}
        if self.llama is None:
            self.llama = Llama(self.weights, context=tokens + new_tokens, reuse=False)
            self.llama.generate(**request)
        seconds = {"stream": 0.0, "generate": 0.0}
        for way in ("stream", "generate", "generate", "stream"):  # a drift of the machine cancels
            began = time.perf_counter()
            list(self.llama.stream(**request)) if way == "stream" else self.llama.generate(
                **request
            )
            seconds[way] += (time.perf_counter() - began) / 2
        return seconds

    def batch_of(self, prompts: list[list[int]], new_tokens: int, slots: int) -> dict[str, float]:
        """Return the figures of `programs.run_batch`: many requests, without a server."""
        llama = Llama(self.weights, slots=slots, context=self.contexts[1])
        return programs.run_batch(llama, prompts, new_tokens)

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of this process, and of the device if it has its own."""
        stats = jax.devices()[0].memory_stats() or {}
        programs = sum(len(executor.compiled.names) for executor in self.executors.values())
        peaks = {"process_bytes": protocol.peak_rss(), "programs": programs}
        if "peak_bytes_in_use" in stats:
            peaks["device_bytes"] = stats["peak_bytes_in_use"]
        return peaks

    def _take(self, batch: int) -> tuple[Executor, DecodeState | None]:
        """Return the executor of a batch and its state, which is consumed; only one is kept."""
        if batch not in self.executors:
            sizes: dict[str, Any] = {"batch": batch, "context": self.contexts[batch]}
            self.executors[batch] = Executor(self.config, self.weights.params, self.dtype, **sizes)
        state = self.state if batch == self.batch else None
        self.batch, self.state = batch, None
        return self.executors[batch], state


if __name__ == "__main__":
    protocol.serve(Ours())
