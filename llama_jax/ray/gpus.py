"""GPUs: how many of Ray's a process may have."""

import math

from llama_jax.errors import InputError


def check_gpus(name: str, gpus: float) -> None:
    """Refuse what Ray cannot give, under the name that the caller has for it.

    Raises:
        InputError: it is neither 0, nor a part of one GPU, nor whole ones.
    """
    if not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
        raise InputError(f"{name} is {gpus!r:.40}, expected 0, a part of 1, or a whole number")
