"""Small models, and the ways to compute that every law is held against."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ModelConfig
from llama_jax.decode.plan import Plan
from llama_jax.nn import kernel_choice
from llama_jax.nn.cpu_kernels import has_kernels
from llama_jax.nn.kernel_choice import KernelChoice
from llama_jax.nn.transformer import param_shapes

SMALL = ModelConfig(
    vocab_size=97,
    dim=24,
    ffn_dim=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=64,
)

CONFIG = dataclasses.replace(SMALL, max_seq_len=600)

PURE = Plan("float32", "float32", KernelChoice("plain", "blocks"))
NATIVE = Plan("float32", "float32", kernel_choice.NATIVE)

PURE_MARKS = [pytest.mark.exhaustive] if has_kernels() else []
"""Without kernels a CPU computes by PURE: tested by default only where that is so."""


@functools.cache
def random_params(config, dtype=jnp.float32):
    """Parameters whose norms are not all one, so that leaving one out shows."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:
            return jnp.asarray(rng.normal(1.0, 0.1, leaf.shape), dtype)
        return jnp.asarray(rng.normal(0.0, leaf.shape[1] ** -0.5, leaf.shape), dtype)

    return jax.tree.map(draw, param_shapes(config))
