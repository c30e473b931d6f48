"""Weights to measure with: a checkpoint's, or made-up ones, since speed does not depend on them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.decode.plan import choose_plan
from llama_jax.nn.shapes import SCALE
from llama_jax.nn.transformer import param_shapes
from llama_jax.weights.checkpoint import Checkpoint, load_checkpoint


def make_weights(config: ModelConfig, dtype: str, path: str | None) -> Checkpoint:
    """Return a checkpoint's weights, or made-up ones of the shape, ready on the device.

    Made-up ones have the dtype that an Executor holds, so that it need not make a copy.
    """
    if path is not None:
        checkpoint = load_checkpoint(path, dtype)
    else:
        shapes = param_shapes(config, choose_plan(config, dtype).weights)
        params = jax.tree_util.tree_map_with_path(functools.partial(_made_up, config), shapes)
        checkpoint = Checkpoint(config, params, dtype, tokenizer=None)
    jax.block_until_ready(checkpoint.params)
    return checkpoint


def _made_up(config: ModelConfig, keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return one parameter."""
    name = keys[-1].key
    if not name.endswith(SCALE):
        return filled(leaf.shape, leaf.dtype)
    inputs = config.ffn_dim if name.startswith("down") else config.dim
    return jnp.full(leaf.shape, math.sqrt(3 / inputs) / 127, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def filled(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return pseudo-random numbers of the scale that keeps activations' size; ones for a norm.

    A hash of the index, computed as the array is written: nothing else takes memory.
    """
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = index * jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    if dtype == jnp.int8:
        return ((bits % 255).astype(jnp.int32) - 127).astype(jnp.int8)
    uniform = (bits >> 8).astype(jnp.float32) * (2.0**-23) - 1.0
    return (uniform * math.sqrt(3 / shape[-1])).astype(dtype)
