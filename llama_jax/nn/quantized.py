"""Quantized: a weight of int8 numbers, each of whose outputs has a scale.

The weight is `values * scale[:, None]`. Products are of `values`, widened as they are read, and the
sum of each output is multiplied by its scale once, at the end. docs/checkpoints.md has the law by
which `python -m convert quantize` makes them.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float32, Int8


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight as a projection takes it, in place of an array."""

    values: Int8[Array, "o i"]
    scale: Float32[Array, "o"]
    dtype: Any
    """The run's, to which an implementation may round activations."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs and inputs."""
        return self.values.shape
