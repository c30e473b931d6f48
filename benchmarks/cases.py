"""What is measured: cases, the engines that run them, and which of them fit this machine."""

import dataclasses
from collections.abc import Sequence

from benchmarks import command
from benchmarks.model_cost import Cost, decode_cost, kv_bytes, prefill_cost, weight_bytes
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

    def cost(self, config: ModelConfig, dtype: str) -> Cost:
        """Return the least work of the case."""
        if self.op == "prefill":
            return prefill_cost(config, dtype, tokens=self.tokens)
        return decode_cost(
            config, dtype, batch=self.batch, context=self.tokens, new_tokens=self.new_tokens
        )

    def __str__(self) -> str:
        batch = f" batch {self.batch} context" if self.op == "decode" else ""
        return f"{self.op}{batch} {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Engine:
    """A program to measure, in one dtype."""

    kind: str
    """`ours` or one of PEERS."""
    dtype: str

    def bytes_of(self, config: ModelConfig, case: Case | None = None) -> int:
        """Return the bytes that its weights take, and the cache of a case."""
        cache = case.batch * case.positions * kv_bytes(config, self.dtype) if case else 0
        return weight_bytes(config, self.dtype) + cache

    def __str__(self) -> str:
        return f"{self.kind}:{self.dtype}"


def parse_peer(text: str, dtype: str) -> Engine:
    """Return the engine of one entry of --against: `hf`, or `hf:bfloat16` to choose its dtype."""
    kind, _, forced = text.partition(":")
    if kind not in PEERS:
        raise InputError(f"--against names {kind!r}, expected {', '.join(PEERS)}")
    command.check_modules(f"--against={kind}", PEERS[kind])
    return Engine(kind, command.check_dtype(forced or dtype, "--against"))


def make_plan(
    config: ModelConfig, engines: Sequence[Engine], cases: Sequence[Case], memory: int | None
) -> tuple[dict[Engine, list[Case]], list[dict[str, str]]]:
    """Return each engine's cases, and those left out with the reason.

    Args:
        config: the shape.
        engines: what to measure; all are in memory at once, to take turns.
        cases: of each engine.
        memory: bytes available for weights and caches; None: unknown.

    Raises:
        InputError: nothing can be measured.
    """
    skipped = []
    others = {e: sum(o.bytes_of(config) + HEADROOM for o in engines if o != e) for e in engines}
    plan: dict[Engine, list[Case]] = {engine: [] for engine in engines}
    for engine in engines:
        for case in cases:
            need = engine.bytes_of(config, case) + HEADROOM + others[engine]
            reason = None
            if case.positions > config.max_seq_len:
                reason = f"needs {case.positions:,} positions, of {config.max_seq_len:,}"
            elif engine.kind == "llamacpp" and case.batch > 1:
                reason = "measured at batch 1 only"
            elif memory is not None and need > memory:
                reason = f"needs {need / 1e9:.1f} GB beside the others, {memory / 1e9:.1f} are free"
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
