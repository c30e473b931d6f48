"""Executor: one set of weights on the device, and the calls that read prompts and decode."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.decode.compiled import CompiledPrograms, CompileLog
from llama_jax.decode.huge_pages import use_huge_pages
from llama_jax.decode.lockstep import Lockstep
from llama_jax.decode.model_programs import (
    CheckDraws,
    Decode,
    FirstToken,
    Logits,
    Prefill,
    Score,
)
from llama_jax.decode.needs import ALL_NEEDS, Needs, covering
from llama_jax.decode.plan import Plan, choose_plan
from llama_jax.decode.program import Program, Target
from llama_jax.decode.replicas import part_of, specs
from llama_jax.decode.sizes import Sizes
from llama_jax.decode.state import Admission, DecodeState
from llama_jax.decode.state_programs import (
    Admit,
    ClearSlot,
    CopySlot,
    InitCache,
    InitState,
    Release,
)
from llama_jax.decode.steps import Logprobs, ReadChunk, StepOutputs, with_infinities
from llama_jax.decode.texts import CheckedDraws, Law
from llama_jax.decode.warm_up import example, serving_programs
from llama_jax.decode.window_programs import Verify
from llama_jax.jax_settings import pinned_settings, to_host
from llama_jax.nn.shapes import param_dtype
from llama_jax.nn.sharding import ONE_DEVICE, make_mesh, place, replicas_of, shards_of
from llama_jax.nn.transformer import Params, Transformer


class Executor:
    """Call the device programs of one model at the sizes that `Sizes` chooses.

    Methods that take a state consume it and return the next one.

    Args:
        config: the model's shape.
        params: its parameters.
        dtype: the run's, of weights and cache, unless the plan holds them otherwise.
        batch: slots, of all replicas together.
        context: tokens of prompt plus output that a slot can hold, at most `config.max_seq_len`.
        plan: how to compute; None: as `choose_plan` says.
        drawable: only ids below it are sampled; None: all of the vocabulary.
        mesh: the devices to run on; see `sharding.make_mesh`. None: the one that holds the
            parameters.
        lockstep: if the devices are of several processes, tells the others of each call.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: str,
        *,
        batch: int = 1,
        context: int,
        plan: Plan | None = None,
        drawable: int | None = None,
        mesh: Mesh | None = None,
        lockstep: Lockstep | None = None,
    ):
        self.lockstep = lockstep
        self.plan = plan = plan or choose_plan(config, dtype)
        self.config, self.batch, self.context = config, batch, context
        with pinned_settings():
            self.params = jax.tree_util.tree_map_with_path(
                lambda keys, a: jnp.asarray(a, param_dtype(keys[-1].key, config, plan.weights)),
                params,
            )
        if mesh is None:
            mesh = make_mesh(ONE_DEVICE, list(jax.tree.leaves(self.params)[0].devices()))
        self.sizes = Sizes(plan, batch, context, replicas_of(mesh))
        assert batch % self.sizes.replicas == 0, (batch, mesh.shape)
        shards = shards_of(mesh)
        if mesh.size > 1:
            parts = place(specs(self.params, config, mesh), mesh)
            self.params = jax.device_put(self.params, parts)
        use_huge_pages(jax.tree.leaves(self.params))
        self.mesh, self.device = mesh, mesh.local_devices[0]
        model = Transformer(config, jnp.dtype(plan.weights), plan.kernels, shards)
        shape = batch, self.sizes.capacity, plan.cache
        target = Target(config, model, *shape, mesh, drawable, plan.varied_steps)
        self.programs = CompiledPrograms(target)

    @property
    def compiled(self) -> CompileLog:
        """What was compiled so far."""
        return self.programs.log

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that a device reads for one decoded token; of the embedding table, next
        to none."""
        params = dict(self.params)
        if not self.config.tie_embeddings:
            del params["embed"]
        parts = (array.addressable_shards[0].data for array in jax.tree.leaves(params))
        return sum(part.nbytes for part in parts)

    def init_state(self) -> DecodeState:
        """Return a fresh state of idle slots."""
        return self.call(InitState())

    def admit(self, state: DecodeState, slot: int, new: Admission) -> DecodeState:
        """Give a slot to a request; see `state.admit`."""
        return self.call(Admit(), state, slot, new)

    def release(self, state: DecodeState, slot: int) -> DecodeState:
        """End a slot's request early; see `state.release`."""
        return self.call(Release(), state, slot)

    def copy_slot(self, state: DecodeState, source: int, target: int) -> DecodeState:
        """Copy the cache of one slot to another of its replica; see `state.copy_slot`."""
        return self.call(CopySlot(), state, source, target)

    def clear_slot(self, state: DecodeState, slot: int) -> DecodeState:
        """Set the cache of one slot to zero; see `state.clear_slot`. Compiled at its first use."""
        return self.call(ClearSlot(), state, slot)

    def prefill_chunk(
        self, state: DecodeState, slot: int, prompt: Sequence[int], start: int, size: int
    ) -> tuple[DecodeState, ReadChunk]:
        """Read one of the prompt's `Sizes.chunks` into an admitted slot.

        Of several replicas each returns a part of the chunk; that of the slot's holds it.
        """
        program = Prefill(size, self.sizes.bucket(start + size))
        return self.call(program, self.params, state, slot, prompt, start)

    def score(self, chunk: ReadChunk, slot: int, prompt: Sequence[int], start: int) -> Logprobs:
        """Return the log-probabilities [size, 1] of the tokens that follow those of a chunk."""
        program = Score(len(chunk.hidden) // self.sizes.replicas)
        scores = self.call(program, self.params, chunk, slot, prompt, start)
        return self._part_of(scores, slot)

    def first_token(
        self, state: DecodeState, slot: int, chunk: ReadChunk, needs: Needs
    ) -> tuple[DecodeState, StepOutputs]:
        """Sample a slot's first token after its prompt's last chunk; one step of one column."""
        program = self.programs.choose([FirstToken(each) for each in covering(needs)])
        state, outputs = self.call(program, self.params, state, slot, chunk)
        return state, self._part_of(outputs, slot)

    def prefill(
        self,
        state: DecodeState,
        slot: int,
        prompt: Sequence[int],
        start: int = 0,
        *,
        needs: Needs = ALL_NEEDS,
    ) -> tuple[DecodeState, StepOutputs]:
        """Read all chunks of a prompt into an admitted slot; return the first token's step."""
        chunk = None
        for begin, size in self.sizes.chunks(len(prompt), start):
            state, chunk = self.prefill_chunk(state, slot, prompt, begin, size)
        assert chunk is not None, "an empty prompt"
        return self.first_token(state, slot, chunk, needs)

    def decode(
        self,
        state: DecodeState,
        slots: Sequence[int],
        longest: int,
        needs: Needs = ALL_NEEDS,
        steps: int | None = None,
    ) -> tuple[DecodeState, StepOutputs, list[int]]:
        """Run the next steps of some slots; with a plan of varied steps until all of them are done.

        Args:
            state: as returned before.
            slots: those to decode. The others must be done; some or all are computed as well.
            longest: the highest position among `slots`.
            needs: what their requests need, or more.
            steps: how many; None: the plan's `decode_steps`. Fewer if its steps are varied.

        Returns:
            The state, what was generated in `decode_steps` steps, and the slot of each column.
        """
        most = self.plan.decode_steps
        steps = most if steps is None else steps
        assert 0 < steps <= most, steps
        assert self.plan.varied_steps or steps == most, steps
        slots = self.sizes.decode_slots(slots)
        sizes = len(slots), most, self.sizes.bucket(longest + most)
        program = self.programs.choose([Decode(*sizes, each) for each in covering(needs)])
        state, outputs = self.call(program, self.params, state, slots, steps)
        return state, outputs, slots

    def verify(
        self,
        state: DecodeState,
        drafts: Mapping[int, Sequence[int]],
        width: int,
        longest: int,
        needs: Needs = ALL_NEEDS,
    ) -> tuple[DecodeState, StepOutputs, list[int]]:
        """Draw the next tokens of some slots, one and one more for each draft that equals it.

        Args:
            state, longest, needs: see `decode`.
            drafts: of each slot to decode, at most `width` - 1.
            width: one of the plan's windows.

        Returns:
            As `decode`: `width` steps.
        """
        slots = self.sizes.decode_slots(list(drafts))
        sizes = len(slots), width, self.sizes.bucket(longest + width)
        program = self.programs.choose([Verify(*sizes, each) for each in covering(needs)])
        own = [drafts.get(slot, ()) for slot in slots]
        state, outputs = self.call(program, self.params, state, slots, own)
        return state, outputs, slots

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the float32 logits [T, V] after each token of a text."""
        cache = self.call(InitCache())
        parts = []
        for start, size in self.sizes.chunks(len(tokens)):
            program = Logits(size, self.sizes.bucket(start + size))
            cache, logits = self.call(program, self.params, cache, tokens, start)
            parts.append(to_host(logits)[: len(tokens) - start])
        return np.concatenate(parts)

    def check_draws(
        self, tokens: Sequence[int], num_prompt: int, law: Law, needs: Needs
    ) -> CheckedDraws:
        """Draw again each token of a text after its prompt; see `texts.check_draws`.

        Returns:
            NumPy arrays, a row for each token after the prompt.
        """
        cache = self.call(InitCache())
        parts: list[CheckedDraws] = []
        for start, size in self.sizes.chunks(len(tokens) - 1):
            program = CheckDraws(size, self.sizes.bucket(start + size), needs)
            values = (cache, tokens, start, num_prompt, law)
            cache, checked = self.call(program, self.params, *values)
            parts.append(jax.tree.map(to_host, checked))
        drawn = slice(num_prompt - 1, len(tokens) - 1)
        ids, *measured = (np.concatenate(rows)[drawn] for rows in zip(*parts, strict=True))
        return CheckedDraws(ids, *map(with_infinities, measured))

    def warm_up(self, programs: Iterable[Program] | None = None) -> Iterator[tuple[int, int]]:
        """Compile some programs, or those that serve every request; yield (done, total) after each.

        Those that do less, where less is needed, are compiled when they are first `wanted`, and
        `Score`, which takes little time, when it is first called.
        """
        needed = list(serving_programs(self.sizes) if programs is None else programs)
        for done, program in enumerate(needed, start=1):
            self.compile(program)
            yield done, len(needed)

    def compile_wanted(self) -> None:
        """Compile the programs that are wanted by now."""
        wanted = self.programs.wanted
        while not wanted.empty():
            if (program := wanted.get()) is not None:
                self.compile(program)

    def compile(self, program: Program) -> None:
        """Compile one of the programs that requests need; any thread may, beside calls."""
        if self.lockstep is not None:
            self.lockstep.compile(program)
        model = self.config, self.params, self._state_shapes, self.sizes.replicas
        self.programs.compile(program, *example(program, *model))

    @functools.cached_property
    def _state_shapes(self) -> DecodeState:
        return self.programs.shapes(InitState())

    def call(self, program: Any, *values: Any) -> Any:
        """Run a program on the arguments that it makes of these values."""
        if self.lockstep is not None:
            self.lockstep.call(program, values)
        return self.programs.run(program, *program.arguments(*values))

    def _part_of(self, results: Any, slot: int) -> Any:
        """Return the results that a slot's replica has of a program about the slot."""
        return part_of(results, self.mesh, self.sizes.replica_of(slot))
