"""CompiledPrograms: the executables of one target, each compiled once and timed."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from llama_jax.decode.programs import Program, Target
from llama_jax.jax_settings import pinned_settings


@dataclasses.dataclass
class CompileLog:
    """What was compiled: names like `prefill(16, 512)`, and seconds spent."""

    names: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class CompiledPrograms:
    """The executables of one target, each compiled at its first use.

    Calls may come from several threads only under one lock: the engine's.

    Args:
        target: what to compile for.
    """

    def __init__(self, target: Target):
        self.log = CompileLog()
        self._target = target
        self._executables: dict[Program, jax.stages.Compiled] = {}

    def __getitem__(self, name: str) -> jax.stages.Compiled:
        """Return the executable of a program that is compiled, to inspect it."""
        return next(e for program, e in self._executables.items() if str(program) == name)

    def function(self, program: Program) -> Callable[..., Any]:
        """Return the function that a program compiles."""
        return program.function(self._target)

    def shapes(self, program: Program) -> Any:
        """Return the shapes of what a program without arguments returns; allocates nothing."""
        with pinned_settings(self._target.device):
            return jax.eval_shape(self.function(program))

    def run(self, program: Program, *args: Any) -> Any:
        """Call a program; it consumes the arguments that it donates."""
        if program not in self._executables:
            self.compile(program, *args)
        with pinned_settings(self._target.device):
            return self._executables[program](*args)

    def compile(self, program: Program, *args: Any) -> None:
        """Compile a program for arguments of these shapes, if it is not compiled yet."""
        if program in self._executables:
            return
        began = time.perf_counter()
        jitted = jax.jit(self.function(program), donate_argnums=program.donated)
        with pinned_settings(self._target.device):
            self._executables[program] = jitted.lower(*args).compile()
        self.log.names.append(str(program))
        self.log.seconds += time.perf_counter() - began
