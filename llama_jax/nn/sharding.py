"""Sharding: one model over several devices, so that no sum crosses from one to another.

Every projection is split by its outputs: each output is one sum, on one device. What the next
operation needs whole is gathered. So a device computes what one alone would, and the bits do not
depend on how many there are, as far as a product's do not depend on the number of its outputs.
Heads are split by key/value head, and where there are fewer of these than devices, each is on
several, which share its query heads.

A model that is split, or that fits one device, may be there several times: in replicas, between
which nothing is exchanged.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.jax_settings import find_devices
from llama_jax.nn.cache import LayerCache
from llama_jax.nn.shapes import SCALE, param_dtype, shapes_by_path

AXES = ("kv", "group")
"""Of the mesh: parts of the key/value heads, and parts of the query heads that share one."""

DATA = "data"
"""The mesh's first axis: replicas of the model."""

_BY_OUTPUT = {"q", "o", "gate", "up", "down"}


class Shards(NamedTuple):
    """Static: into how many parts a model is split."""

    kv: int = 1
    group: int = 1

    @property
    def devices(self) -> int:
        """How many."""
        return self.kv * self.group

    def gather(self, x: Float[Array, "*batch part"]) -> Float[Array, "*batch whole"]:
        """Return the whole of an array whose last dimension is split over all devices."""
        if self.devices == 1:
            return x
        # By a dimension of its own. To gather by the last one, XLA on a GPU would put it first in
        # memory, and then transpose the keys of all the cache to suit that, before each scan.
        parts = jnp.moveaxis(lax.all_gather(x, AXES), 0, -2)
        return parts.reshape(*x.shape[:-1], -1)


ONE_DEVICE = Shards()


def choose_shards(config: ModelConfig, count: int) -> Shards:
    """Return how to split a model over so many devices.

    Raises:
        InputError: its heads, or its widths, cannot be divided by that.
    """
    if count < 1:
        raise InputError(f"devices is {count}, expected a whole number from 1")
    if not _divides(config, count):
        sizes = [n for n in range(1, config.num_heads + 1) if _divides(config, n)]
        raise InputError(
            f"the model cannot be split over {count} devices: it has {config.num_kv_heads} "
            f"key/value heads, {config.num_heads} heads, and widths of {config.dim:,} and "
            f"{config.ffn_dim:,}; choose {', '.join(map(str, sizes))}"
        )
    kv = math.gcd(count, config.num_kv_heads)
    return Shards(kv, count // kv)


def _divides(config: ModelConfig, count: int) -> bool:
    by_heads = config.num_kv_heads % count == 0 or count % config.num_kv_heads == 0
    widths = (config.num_heads, config.dim, config.ffn_dim)
    return by_heads and all(width % count == 0 for width in widths)


def make_mesh(shards: Shards, devices: Sequence[Any]) -> Mesh:
    """Return the mesh of these devices: of as many replicas as there are times the shards."""
    shape, names = (len(devices) // shards.devices, *shards), (DATA, *AXES)
    if len(devices) == 1:
        return Mesh(np.array(devices).reshape(shape), names)
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=auto, devices=devices)


def find_mesh(config: ModelConfig, devices: int | str, replicas: int = 1) -> Mesh:
    """Return the mesh to run a model on.

    Args:
        config: its shape.
        devices: over how many each replica is split, or "all": all that are here are shared among
            the replicas; see `find_devices`.
        replicas: how often the model is there; see `check_replicas`.

    Raises:
        InputError: there are not so many, or the model cannot be split over them.
    """
    found = find_devices(devices) if replicas == 1 else _find_shared(devices, replicas)
    return make_mesh(choose_shards(config, len(found) // replicas), found)


def check_replicas(replicas: int) -> None:
    """Refuse a number of replicas that is none, or that several processes would share."""
    if type(replicas) is not int or replicas < 1:
        raise InputError(f"replicas is {replicas!r}, expected a whole number from 1")
    if replicas > 1 and jax.process_count() > 1:
        raise InputError(
            f"replicas is {replicas}, expected 1: the {jax.process_count()} processes run one copy "
            "of the model together; start a server for each copy"
        )


def _find_shared(devices: int | str, replicas: int) -> list[Any]:
    """Return the devices of several replicas, the default one first."""
    found = find_devices("all")
    if devices == "all" and len(found) % replicas == 0:
        return found
    here = f"the {len(found)} {found[0].platform.upper()} devices that are here"
    most = len(found) // replicas
    if type(devices) is not int or not 1 <= devices <= most:
        wanted = f"1 to {most}" if most else "fewer replicas"
        whole = "'all' or " if len(found) % replicas == 0 else ""
        raise InputError(
            f"devices is {devices!r} with {replicas} replicas, expected {whole}{wanted}: the "
            f"replicas share {here}"
        )
    return found[: devices * replicas]


def shards_of(mesh: Mesh) -> Shards:
    """Return into how many parts a model on a mesh is split."""
    return Shards(*(mesh.shape[name] for name in AXES))


def replicas_of(mesh: Mesh) -> int:
    """Return how often a model is there on a mesh."""
    return mesh.shape[DATA]


def splits_head(config: ModelConfig, shards: Shards) -> bool:
    """Return whether the output layer is split; else every device has it whole.

    It is not where it is the table of embeddings, which is split by width or not at all, nor where
    the vocabulary, to which a fine-tune may add a token, does not divide.
    """
    return not config.tie_embeddings and config.vocab_size % shards.devices == 0


def param_spec(path: str, config: ModelConfig, shards: Shards) -> P:
    """Return how a parameter is split; see `shapes_by_path` for the paths."""
    name = path.rpartition("/")[2]
    if name.endswith(SCALE):  # as the outputs of its projection
        outputs, _ = param_spec(path.removesuffix(SCALE), config, shards)
        return P(outputs)
    if name in _BY_OUTPUT or (name == "lm_head" and splits_head(config, shards)):
        return P(AXES, None)
    if name in ("k", "v"):
        return P("kv", None)
    if name == "embed" and not config.tie_embeddings:
        return P(None, AXES)
    return P()


def split_axis(path: str, config: ModelConfig) -> int | None:
    """Return the axis by which devices split a parameter; None: each has it whole."""
    spec = param_spec(path, config, ONE_DEVICE)
    return next((axis for axis, names in enumerate(spec) if names is not None), None)


def param_sharding(path: str, config: ModelConfig, mesh: Mesh) -> Sharding:
    """Return where a parameter lies on a mesh."""
    if mesh.size == 1:
        return SingleDeviceSharding(mesh.devices.flat[0])
    return NamedSharding(mesh, param_spec(path, config, shards_of(mesh)))


@functools.cache
def num_params(config: ModelConfig, shards: Shards = ONE_DEVICE) -> int:
    """Return how many of the parameters one device holds."""
    return sum(_numbers_held(config, shards).values())


@functools.cache
def weight_bytes(config: ModelConfig, dtype: str, shards: Shards = ONE_DEVICE) -> int:
    """Return the bytes of the parameters that one device holds, of a model of that dtype."""
    return sum(
        count * jnp.dtype(param_dtype(path, config, dtype)).itemsize
        for path, count in _numbers_held(config, shards).items()
    )


def _numbers_held(config: ModelConfig, shards: Shards) -> dict[str, int]:
    sizes = {AXES: shards.devices, "kv": shards.kv, None: 1}
    return {
        path: math.prod(shape)
        // math.prod(sizes[axis] for axis in param_spec(path, config, shards))
        for path, shape in shapes_by_path(config).items()
    }


def specs(tree: Any, config: ModelConfig, shards: Shards) -> Any:
    """Return how each array of a tree is split.

    Parameters, which are in dicts, are split as `param_spec` says, caches by key/value heads, and
    all else is whole on every device.
    """

    def spec(node: Any) -> Any:
        if isinstance(node, LayerCache):
            return jax.tree.map(lambda _: P(None, "kv"), node)
        if isinstance(node, dict):
            return jax.tree_util.tree_map_with_path(
                lambda keys, _: param_spec(keys[-1].key, config, shards), node
            )
        return P()

    return jax.tree.map(spec, tree, is_leaf=lambda node: isinstance(node, LayerCache | dict))


def place(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings that specs name on a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda node: isinstance(node, P)
    )
