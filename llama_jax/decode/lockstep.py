"""Lockstep: processes that share a model's devices must all make the same calls."""

import abc
from collections.abc import Sequence
from typing import Any

from llama_jax.decode.program import Program


class Lockstep(abc.ABC):
    """What the process that decides on the calls tells the others, before each."""

    @abc.abstractmethod
    def call(self, program: Program, values: Sequence[Any]) -> None:
        """Tell that a program is run on these values; see `Executor.call`."""

    @abc.abstractmethod
    def compile(self, program: Program) -> None:
        """Tell that a program is compiled, beside the calls."""

    @abc.abstractmethod
    def fail(self, error: Exception) -> None:
        """Tell that a call failed here: the others may wait in it, so none can go on."""
