"""Replicas: several copies of the model, each with an equal part of the slots, in one program.

A program runs on the devices of all replicas. Decode computes slots of each; what is about one slot
is computed by the replica that has it, and skipped by the others. Nothing goes from one to another:
a slot is copied within its replica, and the host reads a slot's results from its own devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.decode.model_programs import ModelProgram
from llama_jax.decode.program import Program, Target
from llama_jax.decode.state import DecodeState
from llama_jax.decode.steps import Logprobs, ReadChunk, StepOutputs
from llama_jax.nn import sharding
from llama_jax.nn.cache import LayerCache
from llama_jax.nn.sharding import DATA, replicas_of, shards_of


def argument_specs(program: Program, target: Target, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return how each array of a program's arguments is split over the mesh."""
    split = specs(args, target.config, target.mesh)
    part = P(_axis(target.mesh))
    return tuple(part if i in program.per_replica else each for i, each in enumerate(split))


def specs(tree: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Return how each array of a tree is split over a mesh.

    What has an entry for each slot, or is of one slot, is split over the replicas. The rest is the
    same in each, split as `sharding.specs` says.
    """
    axis = _axis(mesh)

    def spec(node: Any) -> Any:
        match node:
            case DecodeState():
                entries = jax.tree.map(lambda _: P(axis), node._replace(cache=()))
                return entries._replace(cache=jax.tree.map(lambda _: P(axis, "kv"), node.cache))
            case StepOutputs():
                return jax.tree.map(lambda _: P(None, axis), node)
            case ReadChunk() | Logprobs():
                return jax.tree.map(lambda _: P(axis), node)
        return sharding.specs(node, config, shards_of(mesh))

    kinds = (DecodeState, StepOutputs, ReadChunk, Logprobs, LayerCache, dict)
    return jax.tree.map(spec, tree, is_leaf=lambda node: isinstance(node, kinds))


def shapes_of_part(args: tuple[Any, ...], split: tuple[Any, ...], mesh: Mesh) -> tuple[Any, ...]:
    """Return the shapes of what one replica has of arguments that are split so, on one device."""
    replicas = replicas_of(mesh)

    def shape(spec: P, array: Any) -> jax.ShapeDtypeStruct:
        sizes = list(jnp.shape(array))
        if DATA in spec:
            sizes[spec.index(DATA)] //= replicas
        return jax.ShapeDtypeStruct(sizes, array.dtype)

    return jax.tree.map(shape, split, args, is_leaf=lambda node: isinstance(node, P))


def in_replicas(function: Callable[..., Any], program: Program, target: Target) -> Any:
    """Return what each device runs, in `shard_map`, of a program's function.

    Slots become those of the device's replica. If the program is about one that another replica
    has, the model is not run: the state stays, and results are zeros.
    """
    replicas = replicas_of(target.mesh)
    if replicas == 1:
        return function
    slots_each = target.batch // replicas
    of_one = [i for i in program.slots if i not in program.per_replica]

    def run(*args: Any) -> Any:
        first = lax.axis_index(DATA) * slots_each
        local = [arg - first if i in program.slots else arg for i, arg in enumerate(args)]
        if not of_one:
            return function(*local)
        is_here = (local[of_one[0]] >= 0) & (local[of_one[0]] < slots_each)
        if isinstance(program, ModelProgram):
            return _run_if(is_here, function, local)
        # To set a slot beyond the last one has no effect; a copy from and to it is of the last.
        for i in of_one:
            local[i] = jnp.where(is_here, local[i], slots_each)
        return function(*local)

    return run


def part_of(results: Any, mesh: Mesh, replica: int) -> Any:
    """Return what one replica has of results; they stay on its first device."""
    if replicas_of(mesh) == 1:
        return results
    device = mesh.devices[replica].flat[0]
    return jax.tree.map(
        lambda array: next(s.data for s in array.addressable_shards if s.device == device), results
    )


def _run_if(condition: Any, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Return what a function does, or else the state as it is and zeros for the rest."""

    def is_state(node: Any) -> bool:
        return isinstance(node, DecodeState)

    def skipped(node: Any) -> Any:
        return next(filter(is_state, args)) if is_state(node) else jnp.zeros_like(node)

    def run(_: Any, results: Any) -> Any:
        state = next(filter(is_state, jax.tree.leaves(results, is_leaf=is_state)), None)
        return function(*(state if is_state(arg) else arg for arg in args))

    results = jax.eval_shape(function, *args)
    # A loop of one turn or none: XLA copies caches that go through `lax.cond` on a GPU.
    turns = condition.astype(jnp.int32)
    return lax.fori_loop(0, turns, run, jax.tree.map(skipped, results, is_leaf=is_state))


def _axis(mesh: Mesh) -> str | None:
    """Return the axis that slots are split over; None: there is one replica."""
    return DATA if replicas_of(mesh) > 1 else None
