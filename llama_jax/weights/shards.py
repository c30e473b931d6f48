"""Shards: a few parameters together, in an Orbax checkpoint of their own."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, innermost_package
from llama_jax.nn.shapes import fixed_dtype
from llama_jax.progress import progress_bar
from llama_jax.weights.chunks import ChunkedHandler, WriteError
from llama_jax.weights.manifest import array_digest, stored_bytes

_ORBAX_ERRORS = (KeyError, MemoryError, OSError, RuntimeError, ValueError)
"""What Orbax and TensorStore raise for corrupted files, full disks and full memory: they have no
types of their own."""

_CHUNKED = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ChunkedHandler()),
    (jax.Array, ocp.type_handlers.get_type_handler(jax.Array)),  # without one Orbax warns
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter to store."""

    path: str
    """Such as layer_0/attention/q."""
    array: np.ndarray
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further entries for its row of the manifest."""


def manifest_row(tensor: Tensor, shard: str, config: ModelConfig) -> dict[str, Any]:
    """Return the row of the manifest of a tensor that is stored in a shard of that name."""
    digest = array_digest(tensor.array)
    row = {"shape": tensor.array.shape, "sha256": digest, "shard": shard} | tensor.notes
    dtype = fixed_dtype(tensor.path, config)
    assert dtype in (None, str(tensor.array.dtype)), tensor.path
    return row | ({"dtype": dtype} if dtype else {})


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


def write_shard(folder: pathlib.Path, shard: list[Tensor], axes: Mapping[str, int | None]) -> None:
    """Write a shard to a folder that does not exist yet.

    Args:
        folder: of the shard.
        shard: its tensors.
        axes: by path, the axis along which a tensor is cut into chunks; None: it is not.

    Raises:
        OSError: it cannot be written: a full disk, no permission.
    """
    tree = nest({t.path: t.array for t in shard})
    chunked = {path: () if axis is None else (axis,) for path, axis in axes.items()}
    save_args = nest({t.path: ocp.SaveArgs(shard_axes=chunked[t.path]) for t in shard})
    with _checkpointer(type_handler_registry=_CHUNKED) as checkpointer:
        try:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args))
        except _ORBAX_ERRORS as error:
            if innermost_package(error) == "llama_jax" and not isinstance(error, WriteError):
                raise
            said = str(error).strip().partition("\n")[0]
            raise OSError(f"{folder} cannot be written: is the disk full? Orbax: {said}") from error
    # Orbax's own mark of success names the temporary path; here the rename is the mark.
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
        InputError: it is corrupted, or does not fit into memory.
    """
    item = nest(dict(abstract))
    restore_args = (
        jax.tree.map(lambda a: ocp.RestoreArgs(restore_type=np.ndarray, dtype=a.dtype), item)
        if to_numpy
        else ocp.checkpoint_utils.construct_restore_args(item)
    )
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
    with _checkpointer() as checkpointer:
        try:
            restored = checkpointer.restore(folder, args=args)
        except _ORBAX_ERRORS as error:
            if innermost_package(error) == "llama_jax":
                raise
            raise _unreadable(folder, abstract, error) from error
    return by_path(restored)


def _unreadable(folder: pathlib.Path, names: Iterable[str], error: Exception) -> InputError:
    said = str(error).strip().partition("\n")[0][:200]
    held = f"{folder} ({', '.join(list(names)[:3])}, ...)"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        return InputError(
            f"{held} does not fit into memory ({said}); use a 16-bit dtype or a larger device"
        )
    return InputError(
        f"{held} is corrupted (Orbax: {type(error).__name__}: {said}); "
        "copy or convert the checkpoint again"
    )


def _checkpointer(**options: Any) -> ocp.Checkpointer:
    # Orbax would by default have up to 96 GB in flight beside the arrays themselves. Compression
    # would save a tenth of random weights, and take as long again to read.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=2,
        restore_concurrent_gb=2,
        **options,
    )
    # Each process reads what it needs by itself: with Orbax's barriers one that fails, or that
    # reads more than the others, would leave these waiting.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


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


def shard_rows(
    path: pathlib.Path, values: dict[str, Any], label: str, progress: bool
) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
    """Yield each shard's folder and its rows of the manifest, and show how far that is."""
    shards: dict[str, dict[str, Any]] = {}
    for name, row in values["tensors"].items():
        shards.setdefault(row["shard"], {})[name] = row
    sizes = {
        shard: sum(stored_bytes(row, values) for row in rows.values())
        for shard, rows in shards.items()
    }
    total = sum(sizes.values())
    with progress_bar(total=total, unit="B", label=label, shown=progress) as bar:
        for shard, rows in shards.items():
            yield path / "params" / shard, rows
            bar.update(sizes[shard])
