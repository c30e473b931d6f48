"""Warm-up: the programs that an executor needs, and arguments of their shapes."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.decode.model_programs import Decode, FirstToken, Prefill, Score
from llama_jax.decode.needs import Needs
from llama_jax.decode.program import Program
from llama_jax.decode.sizes import Sizes
from llama_jax.decode.state import DecodeState
from llama_jax.decode.state_programs import (
    Admit,
    CopySlot,
    InitState,
    Release,
    empty_admission,
)
from llama_jax.decode.steps import ReadChunk
from llama_jax.decode.window_programs import Draft, Verify
from llama_jax.nn.transformer import Params

DRAFT_NEEDS = Needs(), Needs(noise=True, filters=True)
"""Of the programs that draft: one for greedy requests, and one for all."""


def serving_programs(sizes: Sizes) -> Iterator[Program]:
    """Yield the programs that serve every request at these sizes; `Score` is not among them."""
    yield from (InitState(), Admit(), Release(), CopySlot(), FirstToken())
    plan = sizes.plan
    for bucket in sizes.buckets:
        yield from _prefills(sizes, bucket)
        # Where bits may depend on the program all tokens come from one.
        if plan.batch_invariant or not plan.windows:
            for count in sizes.decode_counts:
                yield Decode(count, plan.decode_steps, bucket)
        for count in sizes.decode_counts:
            for width in sizes.windows(count):
                yield Verify(count, width, bucket)


def drafting_programs(sizes: Sizes) -> Iterator[Program]:
    """Yield the programs of a model that drafts at these sizes."""
    yield from (InitState(), Admit())
    for bucket in sizes.buckets:
        yield from _prefills(sizes, bucket)
        for count in sizes.decode_counts:
            for width in sizes.windows(count):
                for needs in DRAFT_NEEDS:
                    yield Draft(count, width - 1, bucket, needs)


def _prefills(sizes: Sizes, bucket: int) -> Iterator[Program]:
    for size in sizes.plan.prefill_sizes:
        if size <= bucket:
            yield Prefill(size, bucket)


def example(
    program: Any, config: ModelConfig, params: Params, state: DecodeState, replicas: int
) -> tuple[Any, ...]:
    """Return arguments of a program's shapes; no state is allocated.

    Args:
        program: one that requests need.
        config, params: the model's.
        state: the shapes of its decode state.
        replicas: how many there are.
    """

    def chunk_shapes(size: int) -> ReadChunk:
        def of_rows(rows: int) -> Any:
            return jax.ShapeDtypeStruct((rows * replicas, config.dim), jnp.float32)

        return ReadChunk(last=of_rows(1), hidden=of_rows(size))

    match program:
        case Admit():
            return program.arguments(state, 0, empty_admission(config))
        case FirstToken():
            return program.arguments(params, state, 0, chunk_shapes(1))
        case Score():
            return program.arguments(params, chunk_shapes(program.size), 0, [0], 0)
        case Prefill():
            return program.arguments(params, state)
        case Decode() | Verify() | Draft():
            return program.arguments(params, state, range(program.num_slots))
        case InitState():
            return program.arguments()
        case _:
            return program.arguments(state)
