"""What is measured: cases, the engines that run them, and which of them fit this machine."""

import dataclasses
import importlib.util
from collections.abc import Sequence

from benchmarks.model_cost import (
    ITEM_BYTES,
    Cost,
    decode_cost,
    kv_bytes,
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
    "flax": (),
}
"""Each peer and the modules that this interpreter must have for it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time."""

    op: str
    """prefill: from a prompt to its first token; decode: further tokens, one by one."""
    tokens: int
    """Of the prompt; or in each row's cache when decoding begins."""
    batch: int = 1
    new_tokens: int = 1
    """StepOutputs per row."""

    @property
    def slots(self) -> int:
        """Cache slots that a row needs."""
        return self.tokens + self.new_tokens

    @property
    def counted(self) -> int:
        """Tokens that its rate counts: the prompt's, or all that are drawn."""
        return self.tokens if self.op == "prefill" else self.batch * self.new_tokens

    def request(self) -> dict[str, int]:
        """Return the arguments of the engines' operation."""
        if self.op == "prefill":
            return {"tokens": self.tokens}
        return {"context": self.tokens, "batch": self.batch, "new_tokens": self.new_tokens}

    def cost(self, config: ModelConfig, dtype: str) -> Cost:
        """Return the least work that the case is."""
        if self.op == "prefill":
            return prefill_cost(config, dtype, tokens=self.tokens)
        return decode_cost(
            config, dtype, batch=self.batch, context=self.tokens, new_tokens=self.new_tokens
        )

    def __str__(self) -> str:
        if self.op == "prefill":
            return f"prefill {self.tokens}"
        return f"decode batch {self.batch} context {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Engine:
    """A program to measure, in one dtype."""

    kind: str
    """`ours` or one of PEERS."""
    dtype: str

    def bytes_of(self, config: ModelConfig, case: Case | None = None) -> int:
        """Return the bytes that its weights take, and the cache of a case."""
        cache = case.batch * case.slots * kv_bytes(config, self.dtype) if case else 0
        return weight_bytes(config, self.dtype) + cache

    def __str__(self) -> str:
        return f"{self.kind}:{self.dtype}"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A case that an engine did not run, and why."""

    engine: Engine
    case: Case
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which engine runs which cases."""

    cases: dict[Engine, tuple[Case, ...]]
    """Of every engine, in the order of running."""
    skipped: tuple[Skipped, ...]
    together: bool
    """All engines fit into memory at once, so that they can take turns."""

    def contexts(self, engine: Engine) -> dict[int, int]:
        """Return the cache slots a row needs, by batch; a batch of 1 is always there."""
        slots = {1: 1}
        for case in self.cases[engine]:
            slots[case.batch] = max(slots.get(case.batch, 0), case.slots)
        return slots


def parse_peer(text: str, dtype: str) -> Engine:
    """Return the engine that one entry of --against names: `hf`, or `hf:bfloat16`.

    Args:
        text: the entry.
        dtype: for an entry that names none.

    Raises:
        InputError: no such peer or dtype, or a package that it needs is not installed.
    """
    kind, _, forced = text.partition(":")
    if kind not in PEERS:
        raise InputError(f"--against names {kind!r}, expected {', '.join(PEERS)}")
    missing = [name for name in PEERS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--against={kind} needs {' and '.join(missing)}, not installed; "
            "pip install -e '.[bench]'"
        )
    return Engine(kind, parse_dtype(forced or dtype, "--against"))


def parse_dtype(text: str, flag: str) -> str:
    """Return a dtype that a flag names.

    Raises:
        InputError: it is none of those that can be measured.
    """
    if text not in ITEM_BYTES:
        raise InputError(f"{flag} has the dtype {text!r}, expected {', '.join(ITEM_BYTES)}")
    return text


def make_plan(
    config: ModelConfig, engines: Sequence[Engine], cases: Sequence[Case], memory: int | None
) -> Plan:
    """Share out the cases, leaving out those that do not fit.

    Args:
        config: the shape.
        engines: what to measure.
        cases: what to measure it on.
        memory: bytes there are for weights and caches; None if that is not known.
    """
    planned = {engine: [] for engine in engines}
    skipped = []
    for engine in engines:
        for case in cases:
            reason = _misfit(config, engine, case, memory)
            if reason:
                skipped.append(Skipped(engine, case, reason))
            else:
                planned[engine].append(case)
    planned = {engine: tuple(own) for engine, own in planned.items() if own}
    needs = [
        HEADROOM + max(engine.bytes_of(config, case) for case in own)
        for engine, own in planned.items()
    ]
    return Plan(planned, tuple(skipped), together=memory is None or sum(needs) <= memory)


def _misfit(config: ModelConfig, engine: Engine, case: Case, memory: int | None) -> str | None:
    """Return why an engine cannot run a case, if so."""
    if case.slots > config.max_seq_len:
        return f"needs {case.slots:,} positions, the shape has {config.max_seq_len:,}"
    if engine.kind == "llamacpp" and case.batch > 1:
        return "measured at batch 1 only"
    need = engine.bytes_of(config, case) + HEADROOM
    if memory is not None and need > memory:
        return f"needs {need / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are free"
    return None
