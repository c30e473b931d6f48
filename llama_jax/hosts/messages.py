"""Messages: what process 0 has the others do, in order, and what they report to it."""

import dataclasses
from typing import Any

from llama_jax.decode.program import Program


@dataclasses.dataclass(frozen=True)
class Load:
    """Load this model."""

    arguments: dict[str, Any]
    """Of `Llama.load`."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Be what process 0 is."""

    fingerprint: str
    """Of its model; see `engine.fingerprint`."""


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a program, beside what runs."""

    program: Program


@dataclasses.dataclass(frozen=True)
class Call:
    """Run a program."""

    program: Program
    values: tuple[Any, ...]
    """What it is called with: small values of the host, and a `Held` for what is on the devices."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A value that each process has a part of: the last of its kind that a program returned."""

    kind: str


@dataclasses.dataclass(frozen=True)
class End:
    """End with process 0."""

    status: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """What a process ends with that cannot go on; to process 0."""

    reason: str
