"""Devices that are not there: XLA compiles for them all the same."""

import contextlib
import importlib.util
import math
import os
from typing import Any

from jax.experimental import topologies

from llama_jax.decode.chips import CHIPS, Chip
from llama_jax.errors import InputError
from llama_jax.jax_settings import Device

TPU_TOPOLOGIES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8"),
}
"""Of each chip, from the smallest that libtpu knows; not all of a topology's devices are used."""

_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
"""What XLA's compiler asks of a card: a GpuTargetConfigProto with NVIDIA's figures."""

TARGETS = (*TPU_TOPOLOGIES, "h100")


def find_target(name: str, count: int = 1) -> tuple[Chip, list[Device]]:
    """Return a chip, and so many devices of it to compile for.

    Args:
        name: one of TARGETS; a TPU's may be followed by its topology, as in "v5e:2x2". Without one
            it is the smallest with so many devices.
        count: devices, all connected with each other.

    Raises:
        InputError: there is no such target, it has fewer devices, or what compiles for it is not
            installed.
    """
    chip, _, topology = name.partition(":")
    if chip not in TARGETS or (topology and chip not in TPU_TOPOLOGIES):
        raise InputError(f"--target={name}, expected one of {', '.join(TARGETS)}, or as v5e:2x2")
    if chip in TPU_TOPOLOGIES:
        _require("libtpu", name, "aot-tpu")
        devices = _tpu(f"{chip}:{topology or _smallest(chip, count)}")
        if len(devices) < count:
            raise InputError(f"--devices={count}, but {name} has {len(devices)}; choose fewer")
        return CHIPS[chip], devices[:count]
    _require("jax_plugins.xla_cuda12", name, "aot-gpu")
    options: dict[str, Any] = {"target_config": _H100, "topology": f"1 x 1 x {count}"}
    return CHIPS[chip], list(topologies.get_topology_desc("", "cuda", **options).devices)


def _smallest(chip: str, count: int) -> str:
    *smaller, largest = TPU_TOPOLOGIES[chip]
    sizes = {each: math.prod(map(int, each.split("x"))) for each in smaller}
    return next((each for each, size in sizes.items() if size >= count), largest)


def _tpu(topology: str) -> list[Device]:
    # libtpu would ask the cloud's metadata server where it is, and allow one process only.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise InputError(f"--target={topology}: libtpu knows no such topology ({said})") from None
    return list(found.devices)


def _require(module: str, target: str, extra: str) -> None:
    found = None
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec(module)
    if found is None:
        raise InputError(
            f"--target={target} needs {module}, not installed; pip install -e '.[{extra}]'"
        )
