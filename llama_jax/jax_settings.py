"""JAX's settings: which are pinned while this package computes, and which device it computes on.

The settings belong to the application, and stay as they are. Contexts hold for their thread only,
so they are entered wherever something is traced, called or placed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax

from llama_jax.errors import InputError

Device: TypeAlias = Any
"""A `jax.Device`, which the type checker takes for a variable."""

IN_FINGERPRINT = (
    "jax_allow_f16_reductions",
    "jax_disable_most_optimizations",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
)
"""Settings that can change bits and are not pinned: the application decides how XLA compiles."""


@contextlib.contextmanager
def pinned_settings(device: Device | None = None) -> Iterator[None]:
    """Pin, in this thread, what the programs were written and tested for.

    They name their dtypes and precisions: with 64-bit types a literal would become int64, and the
    precision that an application chooses is for its own products. They are compiled, whatever it
    debugs. Their arguments are NumPy arrays, which a transfer guard would refuse.

    Args:
        device: where to place what has no place yet; None: JAX's default device.
    """
    with (
        jax.enable_x64(False),
        jax.default_matmul_precision(None),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
        jax.default_device(device) if device is not None else contextlib.nullcontext(),
    ):
        yield


def default_device() -> Device:
    """Return the device that the settings of JAX name, or else JAX's first.

    Raises:
        InputError: they name a backend that is not there.
    """
    settings = jax.config.values
    chosen = settings["jax_default_device"]
    if chosen is not None and not isinstance(chosen, str):
        return chosen
    try:
        return jax.local_devices(backend=chosen)[0]
    except (RuntimeError, AssertionError) as error:  # the latter without a plugin for the backend
        said = str(error).partition("\n")[0] or "no such backend is installed"
        raise InputError(
            f"JAX has no device for jax_platforms={settings['jax_platforms']!r}, "
            f"jax_default_device={chosen!r} ({said}); name a backend that is there, or none"
        ) from None


def find_devices(count: int | str) -> list[Device]:
    """Return devices to run one model on, the default one first.

    Args:
        count: how many; "all": all of the default one's kind. If several processes were joined
            (`jax.distributed`), all of theirs, else those of this one.

    Raises:
        InputError: there are not so many.
    """
    first = default_device()
    if count == 1:
        return [first]
    if jax.process_count() > 1:
        devices = jax.devices(first.platform)
        if count != len(devices) and count != "all":
            raise InputError(
                f"devices is {count!r}, expected 'all' or {len(devices)}: the "
                f"{jax.process_count()} processes run one model on all that they have"
            )
        return devices
    others = [each for each in jax.local_devices(backend=first.platform) if each != first]
    devices = [first, *others]
    if count == "all":
        return devices
    if type(count) is not int or not 1 <= count <= len(devices):
        raise InputError(
            f"devices is {count!r}, expected 'all' or 1 to {len(devices)}, the "
            f"{first.platform.upper()} devices that are here"
        )
    return devices[:count]


def copy_to_host_async(values: Any) -> None:
    """Begin to copy arrays to the host as soon as they are computed: `to_host` then need not."""
    with jax.transfer_guard("allow"):
        for array in jax.tree.leaves(values):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()


def to_host(values: Any) -> Any:
    """Return arrays as NumPy arrays, whatever transfers the application forbids."""
    with jax.transfer_guard("allow"):
        return jax.device_get(values)
