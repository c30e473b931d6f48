"""What is measured: cases, the engines that run them, and which of them fit this machine."""

import dataclasses
from collections.abc import Sequence

from benchmarks import command
from benchmarks.limits import Limits
from benchmarks.model_cost import (
    ITEM_BYTES,
    decode_cost,
    kv_bytes,
    matmul_limit,
    prefill_cost,
    weight_bytes,
)
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError

HEADROOM = 2**30
"""Bytes that an engine may need beyond weights and cache: its program and what it computes."""

PEERS = {
    "hf": ("torch", "transformers"),
    "hf-compile": ("torch", "transformers"),
    "llamacpp": ("llama_cpp", "gguf"),
}
"""Each peer and the modules that this interpreter must have for it."""


WEIGHTS = ("full", "int8")
"""Whether projections have the dtype, or are quantized."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time."""

    op: str
    """prefill: from a prompt to its first token; decode: further tokens, one by one."""
    tokens: int
    """Of the prompt; or in each slot's cache when decoding begins."""
    batch: int = 1
    new_tokens: int = 1
    """Tokens to decode in each slot."""

    @property
    def positions(self) -> int:
        """Cache positions that each slot needs."""
        return self.tokens + self.new_tokens

    @property
    def counted(self) -> int:
        """Tokens counted by its rate: the prompt's, or all new ones."""
        return self.tokens if self.op == "prefill" else self.batch * self.new_tokens

    def request(self) -> dict[str, int]:
        """Return the arguments of the engines' operation."""
        if self.op == "prefill":
            return {"tokens": self.tokens}
        return {"context": self.tokens, "batch": self.batch, "new_tokens": self.new_tokens}

    def figures(
        self, config: ModelConfig, dtype: str, seconds: float, limits: Limits
    ) -> dict[str, float]:
        """Return what a record holds of the case, if it took so many seconds."""
        if self.op == "prefill":
            cost = prefill_cost(config, dtype, tokens=self.tokens)
        else:
            batch, context, new = self.batch, self.tokens, self.new_tokens
            cost = decode_cost(config, dtype, batch=batch, context=context, new_tokens=new)
        least = cost.limit_seconds(limits.bandwidth, matmul_limit(limits.matmul, dtype))
        return {
            "seconds": seconds,
            "tokens_per_s": self.counted / seconds,
            "limit_tokens_per_s": self.counted / least,
            "fraction_of_limit": least / seconds,
            "flop_per_byte": cost.flops / cost.bytes,
            "flop_per_s": cost.flops / seconds,
        }

    def __str__(self) -> str:
        batch = f" batch {self.batch} context" if self.op == "decode" else ""
        return f"{self.op}{batch} {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Engine:
    """A program to measure, in one dtype."""

    kind: str
    """`ours` or one of PEERS."""
    dtype: str
    weights: str = "full"
    """One of WEIGHTS."""

    def config(self, config: ModelConfig) -> ModelConfig:
        """Return the config of a shape as this engine holds it."""
        if self.weights == "full":
            return config
        return dataclasses.replace(config, quantization=self.weights)

    def cache_bytes(self, config: ModelConfig, case: Case) -> int:
        """Return the bytes of keys and values of a case."""
        return case.batch * case.positions * kv_bytes(config, self.dtype)

    def __str__(self) -> str:
        weights = "" if self.weights == "full" else f":{self.weights}"
        return f"{self.kind}:{self.dtype}{weights}"


def parse_peer(text: str, dtype: str) -> Engine:
    """Return the engine of one entry of --against.

    `hf`, or `hf:bfloat16` to choose its dtype; llama.cpp has `llamacpp:float16:int8` too, Q8_0.
    """
    kind, *chosen = text.split(":", 2)
    command.check_choices("--against", [kind], PEERS)
    command.check_modules(f"--against={kind}", PEERS[kind])
    dtype, weights, *_ = [*chosen, *[dtype, "full"][len(chosen) :]]
    command.check_choices(f"--against={kind}", [dtype], ITEM_BYTES)
    allowed = WEIGHTS if kind == "llamacpp" else WEIGHTS[:1]
    command.check_choices(f"--against={kind}:{dtype}", [weights], allowed)
    return Engine(kind, dtype, weights)


def make_plan(
    config: ModelConfig, engines: Sequence[Engine], cases: Sequence[Case], memory: int | None
) -> tuple[dict[Engine, list[Case]], list[dict[str, str]]]:
    """Return each engine's cases, and those left out with the reason.

    All engines are in memory at once, to take turns; `memory` is the bytes there for them.

    Raises:
        InputError: nothing can be measured.
    """
    skipped = []
    held = sum(weight_bytes(engine.config(config), engine.dtype) + HEADROOM for engine in engines)
    plan: dict[Engine, list[Case]] = {engine: [] for engine in engines}
    for engine in engines:
        for case in cases:
            need = held + engine.cache_bytes(config, case)
            reason = None
            if case.positions > config.max_seq_len:
                reason = f"needs {case.positions:,} positions, of {config.max_seq_len:,}"
            elif engine.kind == "llamacpp" and case.batch > 1:
                reason = "measured at batch 1 only"
            elif memory is not None and need > memory:
                reason = f"needs {need / 1e9:.1f} GB with all engines, {memory / 1e9:.1f} are free"
            if reason is None:
                plan[engine].append(case)
            else:
                skipped.append({"case": str(case), "engine": str(engine), "reason": reason})
    plan = {engine: own for engine, own in plan.items() if own}
    if not plan:
        raise InputError(f"no case can be run: {skipped[0]['case']} {skipped[0]['reason']}")
    return plan, skipped


def contexts(cases: Sequence[Case]) -> dict[int, int]:
    """Return the cache positions per slot, by batch; a batch of 1 is always there."""
    positions = {1: 1}
    for case in cases:
        positions[case.batch] = max(positions.get(case.batch, 0), case.positions)
    return positions
