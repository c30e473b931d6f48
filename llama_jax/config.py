"""ModelConfig: the shape of a Llama model, validated, to and from JSON. Standard library only."""

import dataclasses
import json
import math
import pathlib
import reprlib
import typing
from typing import Any

from llama_jax.errors import InputError, one_line
from llama_jax.strict_json import read_json

LARGEST = {
    "vocab_size": 2**24,
    "dim": 2**20,
    "ffn_dim": 2**22,
    "num_layers": 2**12,
    "num_heads": 2**20,
    "num_kv_heads": 2**20,
    "max_seq_len": 2**31 - 1,
}
"""The largest sizes: far above any Llama's, and small enough that no product of two overflows.
Positions are 32-bit integers."""

_FLOAT32 = (2.0**-126, 2.0**127)  # the computation's: smallest normal number, about the largest

QUANTIZATIONS = ("none", "int8")

INT8_LABEL = "int8, not the card's full precision"
"""What results, receipts, servers and lines on the terminal say of quantized weights."""

MAX_SLOTS = 256
"""Answers at once, at most."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What decides the parameters' shapes and what they compute; dtype is a run-time choice.

    Raises:
        InputError: naming every field that is out of range.
    """

    vocab_size: int
    """Tokens; at least 3 (unknown, BOS and EOS are ids 0, 1 and 2)."""
    dim: int
    """Width of the residual stream; a multiple of `2 * num_heads`."""
    ffn_dim: int
    """Width of the SwiGLU feed-forward layer."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides `num_heads` (equal: MHA, fewer: GQA)."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    rope_theta: float
    """Base of the rotary embedding's geometric series of frequencies."""
    max_seq_len: int
    """Positions the model was trained for: the maximum of prompt plus output tokens."""
    tie_embeddings: bool = False
    """The embedding table is also the output projection (no `lm_head`)."""
    rope_factor: float = 1.0
    """Divides the rotary embedding's positions (linear scaling, arXiv:2306.15595); 1 is off."""
    eos_tokens: tuple[int, ...] = (2,)
    """The ids that end an answer."""
    quantization: str = "none"
    """One of QUANTIZATIONS. int8: the layers' projections are, and each of their outputs has a
    float32 scale; see `quantized.py`. Embeddings, output layer and norms have the dtype."""

    def __post_init__(self):
        problems = _type_problems(self)
        if not problems:
            problems = _range_problems(self)
        if problems:
            raise InputError(f"model config: {one_line(problems)}")

    @property
    def head_dim(self) -> int:
        """Width of one head; even, because rotary embedding pairs its elements."""
        return self.dim // self.num_heads

    @property
    def is_quantized(self) -> bool:
        """Whether projections are int8."""
        return self.quantization == "int8"

    @property
    def label(self) -> str | None:
        """What is to be said of the weights wherever a model is named; None: nothing."""
        return INT8_LABEL if self.is_quantized else None

    def precision(self, dtype: str) -> str:
        """Return a run's dtype for people to read, with the label if there is one."""
        return f"{dtype}, weights {self.label}" if self.label else dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, but for `quantization` where there is none.

        So configs that were written, and digested, before it was a field are as they were.
        """
        fields = dataclasses.asdict(self)
        return (
            fields
            if self.is_quantized
            else {k: v for k, v in fields.items() if k != "quantization"}
        )

    def to_json(self) -> str:
        """Return the text that `load` reads."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> "ModelConfig":
        """Build a config from a JSON object whose keys are exactly the field names.

        Args:
            values: the object.
            source: the file's name, for the error.

        Raises:
            InputError: unknown or missing keys, or a value out of range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        problems = [f"unknown key {k!r:.40}" for k in sorted(values.keys() - fields.keys())]
        problems += [f"missing key {k!r}" for k in sorted(required - values.keys())]
        if problems:
            raise InputError(
                f"{source}: {one_line(problems)}; expected the keys {', '.join(fields)}"
            )
        return cls(**{name: _from_json(fields[name].type, v) for name, v in values.items()})

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "ModelConfig":
        """Read one of `configs/*.json` or a checkpoint's `config.json`."""
        return cls.from_dict(read_json(pathlib.Path(path)), source=str(path))


def check_sizes(config: ModelConfig, context: int | None, slots: int, replicas: int = 1) -> None:
    """Refuse what a user may not choose for a model.

    Args:
        config: the model's shape.
        context: tokens of prompt plus output that a slot can hold; None: as many as the model can.
        slots: answers at once.
        replicas: copies of the model, 1 or more, which have as many slots each.

    Raises:
        InputError: one of them is out of range, or the slots cannot be shared equally.
    """
    if context is not None and (type(context) is not int or not 1 <= context <= config.max_seq_len):
        raise InputError(
            f"context is {context!r}, expected 1 to {config.max_seq_len}, "
            "the positions this model was trained for"
        )
    if type(slots) is not int or not 1 <= slots <= MAX_SLOTS:
        raise InputError(f"slots is {slots!r}, expected 1 to {MAX_SLOTS}")
    if slots % replicas:
        more = slots - slots % replicas + replicas
        raise InputError(
            f"slots is {slots}, expected a multiple of {replicas}, since each of the replicas has "
            f"as many; choose {more}, or other replicas"
        )


def _from_json(kind: Any, value: Any) -> Any:
    """Return a value of JSON in its field's type, if it is that but for JSON's own types."""
    if kind is float:
        return as_float(value)
    return tuple(value) if type(value) is list else value


def as_float(value: Any) -> Any:
    """Convert an int to a float: JSON writers print 10000.0 as 10000."""
    if type(value) is not int:
        return value
    return float(value) if abs(value) < 2**53 else math.inf


def _type_problems(config: ModelConfig) -> list[str]:
    problems = []
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if type(value) is not (typing.get_origin(field.type) or field.type):
            expected = getattr(field.type, "__name__", field.type)
            problems.append(f"{field.name} is {value!r:.40}, expected {expected}")
    return problems


def _range_problems(c: ModelConfig) -> list[str]:
    problems = []
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        # A float alone can be infinite; isfinite refuses an int beyond the largest float.
        infinite = field.type is float and not math.isfinite(value)
        if field.type in (int, float) and (infinite or value <= 0):
            problems.append(f"{field.name} is {value!r:.40}, expected a positive number")
        elif field.type is int and value > LARGEST[field.name]:
            problems.append(
                f"{field.name} is {value!r:.40}, expected at most {LARGEST[field.name]:,}"
            )
        elif field.type is float and not _FLOAT32[0] <= value <= _FLOAT32[1]:
            problems.append(f"{field.name} is {value!r:.40}, which float32 cannot hold")
    if problems:
        return problems
    if c.vocab_size < 3:
        problems.append(f"vocab_size is {c.vocab_size}, expected at least 3")
    if c.dim % (2 * c.num_heads):
        problems.append(f"dim is {c.dim}, expected a multiple of 2 * num_heads = {2 * c.num_heads}")
    if c.num_heads % c.num_kv_heads:
        problems.append(f"num_kv_heads is {c.num_kv_heads}, expected a divisor of {c.num_heads}")
    if c.quantization not in QUANTIZATIONS:
        expected = " or ".join(QUANTIZATIONS)
        problems.append(f"quantization is {c.quantization!r:.40}, expected {expected}")
    if not c.eos_tokens or any(
        type(t) is not int or not 0 <= t < c.vocab_size for t in c.eos_tokens
    ):
        problems.append(
            f"eos_tokens is {reprlib.repr(list(c.eos_tokens))}, expected one or more ids below "
            f"vocab_size = {c.vocab_size}"
        )
    return problems
