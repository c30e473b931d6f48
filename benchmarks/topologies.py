"""Devices that are not there: XLA compiles for them all the same."""

import contextlib
import importlib.util
import os
from typing import Any

from jax.experimental import topologies

from llama_jax.decode.chips import CHIPS, Chip
from llama_jax.errors import InputError
from llama_jax.jax_settings import Device

TPU_TOPOLOGIES = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
"""The smallest that libtpu knows of each; one device of it is used."""

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


def find_target(name: str) -> tuple[Chip, Device]:
    """Return a chip, and a device of it to compile for.

    Args:
        name: one of TARGETS; a TPU's may be followed by its topology, as in "v5e:2x2".

    Raises:
        InputError: there is no such target, or what compiles for it is not installed.
    """
    chip, _, topology = name.partition(":")
    if chip not in TARGETS or (topology and chip not in TPU_TOPOLOGIES):
        raise InputError(f"--target={name}, expected one of {', '.join(TARGETS)}, or as v5e:2x2")
    if chip in TPU_TOPOLOGIES:
        _require("libtpu", name, "aot-tpu")
        topology = topology or TPU_TOPOLOGIES[chip]
        return CHIPS[chip], _tpu(f"{chip}:{topology}")
    _require("jax_plugins.xla_cuda12", name, "aot-gpu")
    options: dict[str, Any] = {"target_config": _H100, "topology": "1 x 1 x 1"}
    return CHIPS[chip], topologies.get_topology_desc("", "cuda", **options).devices[0]


def _tpu(topology: str) -> Device:
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
    return found.devices[0]


def _require(module: str, target: str, extra: str) -> None:
    found = None
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec(module)
    if found is None:
        raise InputError(
            f"--target={target} needs {module}, not installed; pip install -e '.[{extra}]'"
        )
