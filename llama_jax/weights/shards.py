"""Shards: a few parameters together, in an Orbax checkpoint of their own."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter to store."""

    path: str
    """Such as layer_0/attention/q."""
    array: np.ndarray
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else its row of the manifest is to say."""


def tensors(params: dict[str, Any]) -> Iterator[Tensor]:
    """Yield every parameter of a tree."""
    for path, leaf in by_path(params).items():
        yield Tensor(path, np.asarray(leaf))


def group(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Group tensors, in order, into lists of `size` bytes, or somewhat more."""
    shard: list[Tensor] = []
    for tensor in tensors:
        shard.append(tensor)
        if sum(t.array.nbytes for t in shard) >= size:
            yield shard
            shard = []
        del tensor
    if shard:
        yield shard


def write_shard(folder: pathlib.Path, shard: list[Tensor]) -> None:
    """Write a shard to a folder that does not exist yet.

    Raises:
        OSError: it cannot be written: a full disk, no permission.
    """
    with _checkpointer() as checkpointer:
        try:
            tree = nest({t.path: t.array for t in shard})
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
        except Exception as error:  # Orbax has no type of its own for a disk that refuses
            said = str(error).strip().partition("\n")[0]
            raise OSError(f"{folder} cannot be written: is the disk full? Orbax: {said}") from error
    # Orbax's own mark of success names the draft's path; here the rename is the mark.
    (folder / "commit_success.txt").unlink(missing_ok=True)


def read_shard(
    folder: pathlib.Path, abstract: dict[str, jax.ShapeDtypeStruct], *, to_numpy: bool = False
) -> dict[str, Any]:
    """Restore a shard's arrays, by path.

    Args:
        folder: of the shard.
        abstract: the shape of each array it holds, and the dtype and sharding to restore it in.
        to_numpy: return NumPy arrays; the shardings do not matter then.

    Raises:
        InputError: it is damaged.
    """
    item = nest(dict(abstract))
    restore_args = (
        jax.tree.map(lambda a: ocp.RestoreArgs(restore_type=np.ndarray, dtype=a.dtype), item)
        if to_numpy
        else ocp.checkpoint_utils.construct_restore_args(item)
    )
    with _checkpointer() as checkpointer:
        try:
            args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            return by_path(checkpointer.restore(folder, args=args))
        except Exception as error:  # Orbax has no type of its own for damage, not even one base
            said = str(error).strip().partition("\n")[0]
            held = f"{folder} ({', '.join(list(abstract)[:3])}, ...)"
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
                raise InputError(
                    f"{held} does not fit into memory ({said[:200]}); use a 16-bit dtype or a "
                    "larger device"
                ) from error
            raise InputError(
                f"{held} is damaged (Orbax: {type(error).__name__}: {said[:200]}); "
                "copy or convert the checkpoint again"
            ) from error


def _checkpointer() -> ocp.Checkpointer:
    # Orbax would by default have up to 96 GB in flight beside the arrays themselves. Compression
    # would save a tenth of random weights, and take as long again to read.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=2,
        restore_concurrent_gb=2,
    )
    return ocp.Checkpointer(handler)


def by_path(params: dict[str, Any]) -> dict[str, Any]:
    """Return a tree's leaves by their paths, such as layer_0/attention/q."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of leaves by their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
