"""Program: a descriptor of what runs on the device, and the target that it is compiled for.

A descriptor is a value: equal ones are one program. It has the function to compile, and a method
`arguments` that makes the arguments of a call. Warm-up uses the same method, so each signature
stands in one place. `compiled.py` compiles them.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.nn.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Target:
    """What programs are compiled for: a model and the shape of its decode state."""

    config: ModelConfig
    model: Transformer
    batch: int
    """Slots."""
    capacity: int
    """Cache positions of each slot."""
    cache_dtype: str
    mesh: Mesh
    """The devices that hold the model and its replicas; see `sharding.make_mesh`."""
    drawable: int | None = None
    """Only ids below it are sampled; None: all."""
    varied_steps: bool = False
    """See `Plan`."""


class Program(abc.ABC):
    """A function at fixed sizes; its `str` is its name."""

    donated: ClassVar[tuple[int, ...]]
    """Indices of the arguments that a call consumes."""
    slots: ClassVar[tuple[int, ...]] = ()
    """Indices of the arguments that are slots, numbered over all replicas."""
    per_replica: ClassVar[tuple[int, ...]] = ()
    """Indices of the arguments of which each replica has a part. A slot that is none of them is one
    replica's: the others skip the program; see `replicas.py`."""

    @abc.abstractmethod
    def function(self, target: Target) -> Callable[..., Any]:
        """Return the pure function to compile."""
