"""Dtypes: those that weights are stored in and run in."""

import logging

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.errors import InputError
from llama_jax.jax_settings import default_device

DTYPES = ("float16", "bfloat16", "float32")


def choose_dtype(asked: DTypeLike | None, stored: str, platform: str | None = None) -> str:
    """Return the name of the dtype to run in.

    Args:
        asked: one of DTYPES, in any form that JAX takes; None: as stored.
        stored: the checkpoint's. On a TPU, which has no float16 products, bfloat16 in its place.
        platform: what it runs on, as JAX names it; None: JAX's default device.

    Raises:
        InputError: another dtype, or one that the device cannot multiply.
    """
    try:
        dtype = stored if asked is None else jnp.dtype(asked).name
    except TypeError:  # nothing that is a dtype's name
        dtype = None
    if dtype not in DTYPES:
        raise InputError(f"dtype is {asked!r}, expected one of {', '.join(DTYPES)}")
    if dtype != "float16" or (platform or default_device().platform) != "tpu":
        return dtype
    if asked is not None:
        raise InputError("dtype is float16, which a TPU cannot multiply; use bfloat16")
    logging.getLogger(__name__).warning(
        "the checkpoint is float16, which a TPU cannot multiply: running in bfloat16 "
        "(8 bits of precision in place of 11)"
    )
    return "bfloat16"
