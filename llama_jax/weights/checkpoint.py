"""Checkpoints in the project's own format: one layout, one version number.

DST/params/00000 ..   Orbax, some 128 MB of parameters each: one array each, none stacked
DST/config.json       ModelConfig
DST/tokenizer.model   SentencePiece; absent if the source had none
DST/manifest.json     what all this is, by digest; see manifest.py
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, one_line
from llama_jax.jax_settings import find_devices, pinned_settings
from llama_jax.nn.shapes import param_dtype
from llama_jax.nn.sharding import ONE_DEVICE, make_mesh, param_sharding, split_axis
from llama_jax.nn.transformer import Params, param_shapes
from llama_jax.progress import progress_bar
from llama_jax.weights.array_sizes import check_arrays
from llama_jax.weights.atomic_directory import atomic_directory
from llama_jax.weights.dtypes import choose_dtype
from llama_jax.weights.manifest import (
    NAME,
    array_digest,
    check_files,
    read_manifest,
    tensor_dtype,
    write_manifest,
)
from llama_jax.weights.processes import is_first, together
from llama_jax.weights.shards import (
    Tensor,
    by_path,
    group,
    manifest_row,
    nest,
    read_shard,
    shard_rows,
    write_shard,
)
from llama_jax.weights.unconverted import checkpoint_folder, remedy

SHARD_BYTES = 2**27
"""A shard is full when it has so many: little is in memory at a time, of any model."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint."""

    config: ModelConfig
    params: Params
    dtype: str
    """The dtype of `params`, one of DTYPES; those that are quantized have their own."""
    tokenizer: pathlib.Path | None
    root: str | None = None
    """The digest of its weights as stored (docs/checkpoints.md); None: made up."""
    tokenizer_digest: str | None = None
    """The SHA-256 of the tokenizer's file, by the manifest."""
    mesh: Mesh | None = None
    """The devices that hold `params`; None: one does."""
    verified: bool = False
    """All of it was compared with its digests when it was loaded."""
    folder: str | None = None
    """The name of its folder, without the path; None: made up."""


def save_checkpoint(
    path: str | pathlib.Path,
    tensors: Iterable[Tensor],
    config: ModelConfig,
    *,
    tokenizer: bytes | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint that is either whole or not there.

    Args:
        path: a folder that does not exist yet.
        tensors: every parameter, by `param_dtype` of one of DTYPES; consumed one by one and dropped
            once written.
        config: the shape they have.
        tokenizer: the content of its tokenizer.model.
        origin: where the weights came from, for the manifest.

    Raises:
        InputError: `path` exists, or another process is writing it.
        OSError: it cannot be written: a full disk, no permission.
    """
    with atomic_directory(path) as folder:
        rows: dict[str, dict[str, Any]] = {}
        dtypes = set()
        names = (f"{i:05}" for i in itertools.count())  # enumerate would hold on to the shard
        for shard in group(tensors, SHARD_BYTES):
            name = next(names)
            axes = {t.path: split_axis(t.path, config) for t in shard}
            write_shard(folder / "params" / name, shard, axes)
            rows |= {t.path: manifest_row(t, name, config) for t in shard}
            dtypes |= {str(t.array.dtype) for t in shard if "dtype" not in rows[t.path]}
            del shard  # before the next is read
        shapes = {name: leaf.shape for name, leaf in by_path(param_shapes(config)).items()}
        assert {name: row["shape"] for name, row in rows.items()} == shapes, "unlike the config"
        (dtype,) = dtypes
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        if tokenizer is not None:
            (folder / "tokenizer.model").write_bytes(tokenizer)
        write_manifest(folder, rows, dtype, origin or {})


@pinned_settings()
def load_checkpoint(
    path: str | pathlib.Path,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    verify: bool = False,
    progress: bool = False,
) -> Checkpoint:
    """Restore a checkpoint onto one or several devices, each of which reads its part.

    Where the mesh has devices of several processes, each of these calls this, with the same
    arguments, and reads the parts of its own devices; if one fails, all do.

    Args:
        path: the folder `save_checkpoint` or `python -m convert` wrote.
        dtype: of the weights in memory; see `choose_dtype`.
        mesh: the devices, as from `find_mesh`; None: the default one.
        verify: first read everything and compare its digests; else sizes and small files only.
            Of several processes the first does so, and the others wait.
        progress: show bars on stderr if it takes over a second, in the first process.

    Raises:
        InputError: the folder is missing, a file, empty, half there, of another version, changed
            after it was written, or its arrays are not those that its config asks for; or another
            process failed, or loads something else.
    """
    mesh = make_mesh(ONE_DEVICE, find_devices(1)) if mesh is None else mesh
    progress = progress and is_first(mesh)
    with together(mesh) as equal:
        path = checkpoint_folder(path)
        values, config = open_checkpoint(path)
        run_dtype = choose_dtype(dtype, values["dtype"])
        equal += [values["root"], run_dtype]
        if verify and is_first(mesh):
            verify_checkpoint(path, progress=progress)
    with together(mesh):
        params = _load_params(path, values, config, run_dtype, mesh, progress)
    return Checkpoint(
        config,
        params,
        run_dtype,
        tokenizer_path(path, values),
        values["root"],
        values["files"].get("tokenizer.model", {}).get("sha256"),
        mesh,
        verify,
        pathlib.Path(os.path.normpath(path)).name or None,
    )


def _load_params(
    path: pathlib.Path,
    values: dict[str, Any],
    config: ModelConfig,
    dtype: str,
    mesh: Mesh,
    progress: bool,
) -> Params:
    restored: dict[str, jax.Array] = {}
    for shard, rows in shard_rows(path, values, "loading", progress):
        abstract = {
            name: jax.ShapeDtypeStruct(
                row["shape"],
                jnp.dtype(param_dtype(name, config, dtype)),
                sharding=param_sharding(name, config, mesh),
            )
            for name, row in rows.items()
        }
        restored |= read_shard(shard, abstract)
        if dtype == "float16" != values["dtype"]:
            _check_range({name: restored[name] for name in rows}, values["dtype"])
    return nest(restored)


def tokenizer_path(path: pathlib.Path, values: dict[str, Any]) -> pathlib.Path | None:
    """Return the tokenizer.model of a checkpoint with this manifest; None: it has none."""
    return path / "tokenizer.model" if "tokenizer.model" in values["files"] else None


def _check_range(arrays: dict[str, jax.Array], stored: str) -> None:
    """Refuse arrays that overflowed, by this process's parts: others may have failed before."""
    beyond = [
        name
        for name, array in arrays.items()
        if not all(jnp.isfinite(part.data).all() for part in array.addressable_shards)
    ]
    if beyond:
        raise InputError(
            f"{one_line(beyond)}: the {stored} weights exceed float16's 65,504; run in {stored}, "
            "or convert them with --dtype=float16 --saturate"
        )


def verify_checkpoint(path: str | pathlib.Path, *, progress: bool = False) -> str:
    """Read all of a checkpoint and compare it with its manifest; return the root digest.

    Raises:
        InputError: as `load_checkpoint`, or naming every tensor that differs.
    """
    path = checkpoint_folder(path)
    values, _ = open_checkpoint(path)
    total = sum(file["bytes"] for file in values["files"].values())
    with progress_bar(total=total, unit="B", label="verifying files", shown=progress) as bar:
        check_files(path, values, update=bar.update)
    problems: list[str] = []
    for _ in _read_stored(path, values, "verifying tensors", progress, problems):
        pass
    if problems:
        raise InputError(
            f"checkpoint {path} is corrupted: {one_line(problems[:8])}"
            + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
            + "; copy or convert it again"
        )
    return values["root"]


def read_tensors(
    path: str | pathlib.Path, *, label: str = "reading", progress: bool = False
) -> Iterator[Tensor]:
    """Yield every parameter as it is stored, as NumPy arrays; few are in memory at a time.

    Raises:
        InputError: as `load_checkpoint`, or at the first tensors that differ from the manifest.
    """
    path = checkpoint_folder(path)
    values, _ = open_checkpoint(path)
    problems: list[str] = []
    for tensor in _read_stored(path, values, label, progress, problems):
        if problems:
            break
        yield tensor
    if problems:
        raise InputError(
            f"checkpoint {path} is corrupted: {one_line(problems[:8])}; copy or convert it again"
        )


def _read_stored(
    path: pathlib.Path, values: dict[str, Any], label: str, progress: bool, problems: list[str]
) -> Iterator[Tensor]:
    """Yield the tensors that are what the manifest says; describe the others in `problems`."""
    for shard, rows in shard_rows(path, values, label, progress):
        abstract = {
            name: jax.ShapeDtypeStruct(row["shape"], jnp.dtype(tensor_dtype(row, values)))
            for name, row in rows.items()
        }
        try:
            found = read_shard(shard, abstract, to_numpy=True)
        except InputError as error:
            problems.append(str(error))
            continue
        for name, row in rows.items():
            if array_digest(found[name]) == row["sha256"]:
                yield Tensor(name, found.pop(name))
            else:
                problems.append(f"{name} is not what was written (params/{row['shard']})")


def open_checkpoint(path: pathlib.Path) -> tuple[dict[str, Any], ModelConfig]:
    """Return the manifest and config of a folder that looks whole.

    Raises:
        InputError: as `load_checkpoint`.
    """
    try:
        if not path.exists():
            raise InputError(f"checkpoint {path} does not exist; check the path")
        if not path.is_dir():
            raise InputError(f"checkpoint {path} is a file, expected the folder convert wrote")
        missing = [n for n in (NAME, "config.json", "params") if not (path / n).exists()]
        if missing:
            raise InputError(f"checkpoint {path} has no {', '.join(missing)}; {remedy(path)}")
        values = read_manifest(path)
    except OSError as error:
        raise InputError(
            f"checkpoint {str(path)[:200]} cannot be read ({error.strerror}); "
            "check the path and its permissions"
        ) from None
    config = ModelConfig.load(path / "config.json")
    check_arrays(path, values, config)
    return values, config
