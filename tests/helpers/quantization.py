"""Quantized models in tests."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from convert.quantization import quantize_weight
from llama_jax.nn.quantized import Quantized
from llama_jax.nn.shapes import SCALE, fixed_dtype
from llama_jax.weights.shards import by_path, nest
from tests.helpers.models import random_params


def quantized(config):
    """Return the config of a quantized model."""
    return dataclasses.replace(config, quantization="int8")


def quantized_params(config, dtype="float32"):
    """Return the parameters of `random_params`, its projections quantized."""
    leaves = {}
    for path, array in by_path(random_params(config, jnp.dtype(dtype))).items():
        if fixed_dtype(path, quantized(config)) is None:
            leaves[path] = array
        else:
            values, scale = quantize_weight(np.asarray(array))
            leaves |= {path: jnp.asarray(values), path + SCALE: jnp.asarray(scale)}
    return nest(leaves)


def draw_quantized(inputs, outputs, dtype="float16", rows=30):
    """Return activations and a quantized weight, all 255 numbers among its."""
    rng = np.random.default_rng(inputs)
    values = rng.integers(-127, 128, (outputs, inputs), np.int8)
    values.flat[:255] = np.arange(-127, 128)[: values.size]
    scale = rng.uniform(1e-4, 2e-2, outputs).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    return x, Quantized(jnp.asarray(values), jnp.asarray(scale), jnp.dtype(dtype))


def product(x, weight):
    """Return a product in float64, and the sum of its terms' sizes, to measure errors by."""
    wide = np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]
    x = np.asarray(x, np.float64)
    return x @ wide.T, np.abs(x) @ np.abs(wide).T
