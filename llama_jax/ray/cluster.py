"""Cluster: the connection to Ray that a command has while it runs."""

import contextlib
import logging
from collections.abc import Iterator

import ray

from llama_jax.errors import InputError

_LOGGERS = ("ray", "ray.data")


@contextlib.contextmanager
def connected(address: str | None = None, level: int = logging.ERROR) -> Iterator[None]:
    """Connect to a cluster meanwhile, or to one that is made for it; keep a connection there is.

    Args:
        address: what `ray.init` takes; None: $RAY_ADDRESS, else a cluster of this machine.
        level: of what Ray logs here.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(level)
    try:
        ray.init(address=address, include_dashboard=False, logging_level=level)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"no Ray cluster at {address or 'this machine'} ({reason}); start one with ray start, "
            "or name another --ray_address"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
