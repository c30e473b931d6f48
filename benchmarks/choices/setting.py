"""Setting: what a sweep measures at, the same for every choice."""

import dataclasses
import pathlib
import time

import jax

from benchmarks import machine
from benchmarks.limits import Limits
from benchmarks.weights import make_weights
from llama_jax.config import ModelConfig
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import Plan
from llama_jax.weights.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: tuple[int, ...] = (1, 256, 8, 32)
    """Rows of a product, those that matter most first."""
    spread: int = 2**28
    """Bytes to cycle through, more than caches hold."""
    layers: int = 4
    batches: tuple[int, ...] = (1, 8, 32)
    slots: tuple[int, ...] = (256, 1024, 4096)
    """Of a cache that attention reads."""
    queries: tuple[int, ...] = (256, 1024)
    """Tokens of a chunk in prefill."""
    steps: tuple[int, ...] = (16, 8, 32, 4, 1)
    """Decoded per dispatch."""
    context: int = 128
    new_tokens: int = 64
    prompts: tuple[int, ...] = (2048, 512, 128)
    ladders: tuple[int, ...] = (128, 256, 512, 1024)
    """The largest chunk of a prefill."""
    draws: int = 16
    """In one loop."""
    seconds: float = 0.2
    """Of timed runs of each way, at least."""


SIZES = {
    "full": Size(),
    "small": Size(
        rows=(1, 2),
        spread=2**16,
        layers=2,
        batches=(2,),
        slots=(256,),
        queries=(64,),
        steps=(4, 1),
        context=32,
        new_tokens=8,
        prompts=(64,),
        ladders=(32, 64),
        draws=4,
        seconds=0.01,
    ),
}
"""By name."""


@dataclasses.dataclass
class Setting:
    """The model, the machine and the time there is."""

    shape: str
    config: ModelConfig
    dtypes: list[str]
    size_name: str
    size: Size
    limits: Limits
    folder: pathlib.Path
    name: str
    """Part of the names of files."""
    xla_flags: list[str] | None
    """Settings for the choice `flags`; None: those of interest on this backend."""
    ends: float
    """When, in time.perf_counter()'s seconds, the budget is spent."""
    _weights: Checkpoint | None = None
    _executors: dict[tuple[Plan, int], Executor] = dataclasses.field(default_factory=dict)

    @property
    def on_cpu(self) -> bool:
        """Whether the default backend is the CPU."""
        return jax.default_backend() == "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether the default backend is a GPU."""
        return jax.default_backend() == "gpu"

    def left(self) -> float:
        """Return the seconds left of the budget."""
        return self.ends - time.perf_counter()

    def memory(self) -> float:
        """Return the bytes that arrays may still take, as far as the system tells."""
        if not self.on_cpu:
            stats = jax.devices()[0].memory_stats() or {}
            return stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)
        free = machine.available_memory()
        return float("inf") if free is None else free

    def weights(self, dtype: str) -> Checkpoint:
        """Return the model's weights in a dtype; only the last asked for are kept."""
        if self._weights is None or self._weights.dtype != dtype:
            self.release()
            self._weights = make_weights(self.config, dtype, None)
        return self._weights

    def executor(self, dtype: str, plan: Plan, context: int) -> Executor:
        """Return an executor of batch 1 over random weights; made once, with its programs."""
        params = self.weights(dtype).params
        if (plan, context) not in self._executors:
            self._executors[plan, context] = Executor(
                self.config, params, dtype, context=context, plan=plan
            )
        return self._executors[plan, context]

    def release(self) -> None:
        """Let go of the weights, and of the executors that hold them."""
        self._weights = None
        self._executors.clear()
