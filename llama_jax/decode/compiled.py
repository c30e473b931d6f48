"""CompiledPrograms: the executables of one target, each compiled once and timed."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from llama_jax.decode.model_programs import ModelProgram
from llama_jax.decode.program import Program, Target
from llama_jax.decode.replicas import argument_specs, in_replicas, shapes_of_part, specs
from llama_jax.jax_settings import pinned_settings
from llama_jax.nn.sharding import ONE_DEVICE, place, replicas_of


@dataclasses.dataclass
class CompileLog:
    """What was compiled: names like `prefill(16, 512)`, and how long it took."""

    names: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    waited_s: float = 0.0
    """How long calls waited for the compilation of their program."""


class CompiledPrograms:
    """The executables of one target.

    One thread at a time may run them: the engine's lock sees to that. Any may compile meanwhile.

    Args:
        target: what to compile for.
    """

    def __init__(self, target: Target):
        self.log = CompileLog()
        self.wanted: queue.SimpleQueue[Program | None] = queue.SimpleQueue()
        """Programs that `choose` would have chosen, each once. None wakes who waits for one."""
        self._target = target
        self._device = target.mesh.local_devices[0]
        self._executables: dict[Program, jax.stages.Compiled] = {}
        self._locks: dict[Program, threading.Lock] = {}
        self._log_lock = threading.Lock()
        self._was_wanted: set[Program] = set()

    @property
    def drawable(self) -> int | None:
        """Ids below it are sampled; None: all."""
        return self._target.drawable

    def __getitem__(self, name: str) -> jax.stages.Compiled:
        """Return the executable of a program that is compiled, to inspect it."""
        return next(e for program, e in self._executables.items() if str(program) == name)

    def function(self, program: Program) -> Callable[..., Any]:
        """Return the function that a program compiles."""
        return program.function(self._target)

    def shapes(self, program: Program) -> Any:
        """Return the shapes of what a program without arguments returns; allocates nothing."""
        with pinned_settings(self._device):
            return jax.eval_shape(self.function(program))

    def choose(self, programs: Sequence[Program]) -> Program:
        """Return the first of some programs that is compiled, else the first.

        Args:
            programs: all give the results that are needed; the first in the least time.
        """
        chosen = next((each for each in programs if each in self._executables), programs[0])
        if chosen != programs[0] and programs[0] not in self._was_wanted:
            self._was_wanted.add(programs[0])
            self.wanted.put(programs[0])
        return chosen

    def run(self, program: Program, *args: Any) -> Any:
        """Call a program, compiled if it is not yet; it consumes the arguments that it donates."""
        if program not in self._executables:
            began = time.perf_counter()
            self.compile(program, *args)
            self.log.waited_s += time.perf_counter() - began
        with pinned_settings(self._device):
            return self._executables[program](*args)

    def compile(self, program: Program, *args: Any) -> None:
        """Compile a program for arguments of these shapes, if it is not compiled yet."""
        with self._locks.setdefault(program, threading.Lock()):
            if program in self._executables:
                return
            began = time.perf_counter()
            with pinned_settings(self._device):
                executable = lower(program, self._target, *args).compile()
            with self._log_lock:
                self.log.names.append(str(program))
                self.log.seconds += time.perf_counter() - began
            self._executables[program] = executable


def lower(program: Program, target: Target, *args: Any) -> jax.stages.Lowered:
    """Return a program for arguments of these shapes, ready to be compiled.

    On several devices each runs it on its parts of parameters and cache, and on all of the rest;
    of several replicas each on its slots.
    """
    function = program.function(target)
    options: dict[str, Any] = {"donate_argnums": program.donated}
    mesh = target.mesh
    if mesh.size > 1:
        ins = argument_specs(program, target, args)
        whole = dataclasses.replace(target, model=target.model.clone(shards=ONE_DEVICE))
        results = jax.eval_shape(program.function(whole), *shapes_of_part(args, ins, mesh))
        outs = specs(results, target.config, mesh)
        if isinstance(program, ModelProgram) or (program.slots and replicas_of(mesh) > 1):
            # Every device computes alike what is whole: the check cannot see that, so it is off.
            function = in_replicas(function, program, target)
            function = jax.shard_map(
                function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False
            )
        options |= {"in_shardings": place(ins, mesh), "out_shardings": place(outs, mesh)}
    return jax.jit(function, **options).lower(*args)
