"""Drafter: what proposes the next tokens of answers, to be verified in one pass of the model."""

import abc
from collections.abc import Iterator, Sequence

from llama_jax.decode.compiled import CompileLog
from llama_jax.engine.slots import Slot


class Drafter(abc.ABC):
    """Propose tokens. A bad proposal costs time, and changes no token."""

    is_free = False
    """Drafts cost next to nothing: they are made where none is verified, too, to learn how many
    would have been accepted."""
    expected_rate = 0.5
    """The share of drafts that is taken to be accepted before any was verified, 0 to 1."""
    is_eager = False
    """All drafts are verified, whatever that costs; for tests and measurements."""
    num_programs = 0
    """How many programs `warm_up` compiles."""

    @property
    def compiled(self) -> Sequence[CompileLog]:
        """What it compiles: the time counts as the executor's own."""
        return ()

    @abc.abstractmethod
    def draft(self, slots: Sequence[Slot], count: int) -> list[list[int]]:
        """Return at most so many next tokens of each slot's generation, whose tokens are read."""

    def allocate(self) -> None:
        """Allocate what `draft` needs; between two turns."""
        return

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile what `draft` needs; yield (done, total) after each program."""
        return iter(())

    def reset(self) -> None:
        """Forget everything, after a failure of the device."""
        return
