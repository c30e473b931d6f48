"""Manifest: what a checkpoint holds and where it came from, by SHA-256.

manifest.json has
  format_version, converter   FORMAT_VERSION; the program that wrote it
  dtype                       of every tensor whose row has none
  origin                      the source, as the writer describes it
  root                        digest over all tensors; see `root_digest`
  tensors                     by path: shape, sha256 of the stored bytes, shard of params/; of
                              a quantized projection dtype; from a conversion also sources (file,
                              name, shape, dtype, sha256 of the bytes there) and rounding (how
                              values changed in a narrower dtype)
  files                       every file but this one: bytes and sha256
  sha256                      digest of all of the above
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError, one_line
from llama_jax.regular_file import open_regular
from llama_jax.strict_json import read_json
from llama_jax.version import __version__
from llama_jax.weights.manifest_form import REMEDY, check_form, check_links

FORMAT_VERSION = 2
QUANTIZED_VERSION = 3
"""Of a checkpoint whose tensors are not all of one dtype, which programs for version 2 refuse."""
NAME = "manifest.json"
_SMALL = 2**20  # bytes of a file that is compared at every load: the config, Orbax's own tables


def array_digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes, row-major and little-endian."""
    contiguous = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(contiguous.view(np.uint8).data).hexdigest()


def root_digest(tensors: dict[str, dict[str, Any]], dtype: str) -> str:
    """Return one digest for all tensors: of the JSON of [path, dtype, shape, sha256], sorted.

    Equal weights have equal roots, whatever files they came from and however they are sharded.
    """
    rows = [
        [path, t.get("dtype", dtype), list(t["shape"]), t["sha256"]]
        for path, t in sorted(tensors.items())
    ]
    return _json_digest(rows)


def tensor_dtype(row: dict[str, Any], values: dict[str, Any]) -> str:
    """Return the dtype of a tensor, by its row of a manifest."""
    return row.get("dtype", values["dtype"])


def stored_bytes(row: dict[str, Any], values: dict[str, Any]) -> int:
    """Return the bytes of a tensor, by its row of a manifest."""
    return math.prod(row["shape"]) * jnp.dtype(tensor_dtype(row, values)).itemsize


def write_manifest(
    folder: pathlib.Path, tensors: dict[str, dict[str, Any]], dtype: str, origin: dict[str, Any]
) -> None:
    """Describe what `folder` holds by now in its manifest.json.

    Args:
        folder: a checkpoint, whole but for the manifest.
        tensors: by path: shape, sha256 and shard, and what else is to be kept.
        dtype: of those that name none.
        origin: where the weights came from.
    """
    values = {
        "format_version": _version(tensors),
        "converter": f"llama_jax {__version__}",
        "dtype": dtype,
        "origin": origin,
        "root": root_digest(tensors, dtype),
        "files": {
            name: {"bytes": size, "sha256": file_digest(folder / name)}
            for name, size in file_sizes(folder).items()
        },
        "tensors": tensors,
    }
    (folder / NAME).write_text(_text(values), encoding="utf-8")


def add_file(folder: pathlib.Path, values: dict[str, Any], name: str, content: bytes) -> None:
    """Add a file to a checkpoint; until the new manifest is in place, it is not a part of it.

    Args:
        folder: a checkpoint.
        values: its manifest, as read.
        name: of the file, which the manifest does not have yet.
        content: of the file.
    """
    (folder / name).write_bytes(content)
    row = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    draft = folder / f".{NAME}.new"
    draft.write_text(_text(values | {"files": values["files"] | {name: row}}), encoding="utf-8")
    draft.replace(folder / NAME)


def _version(tensors: dict[str, dict[str, Any]]) -> int:
    """Return the version of a checkpoint of these tensors."""
    return QUANTIZED_VERSION if any("dtype" in row for row in tensors.values()) else FORMAT_VERSION


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values | {"sha256": _json_digest(values)}, indent=1) + "\n"


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Read a manifest; check it, and by it the size of every file and the digest of small ones.

    The root is computed again from the tensors' rows: it is the name of the weights, in a
    fingerprint too.

    Raises:
        InputError: it is of another version, of another form (see `check_form`), or something
            differs; naming everything that does.
        OSError: the folder cannot be read.
    """
    check_links(folder)
    values = read_json(folder / NAME, remedy=REMEDY)
    version = values.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, QUANTIZED_VERSION):
        raise InputError(
            f"checkpoint {folder} has format version {version!r:.40}, this program reads "
            f"{FORMAT_VERSION} and {QUANTIZED_VERSION}; convert the weights again"
        )
    expected = values.pop("sha256", None)
    if _json_digest(values) != expected:
        raise InputError(f"{folder / NAME} was changed after it was written; {REMEDY}")
    check_form(folder / NAME, values)
    if (root := root_digest(values["tensors"], values["dtype"])) != values["root"]:
        raise InputError(
            f"{folder / NAME} has the root {values['root']}, but its tensors have {root}; {REMEDY}"
        )
    sizes = file_sizes(folder)
    problems = [
        f"{name} {f'has {sizes[name]} of {size} bytes' if name in sizes else 'is missing'}"
        for name, size in ((name, file["bytes"]) for name, file in values["files"].items())
        if sizes.get(name) != size
    ]
    if problems:
        raise InputError(f"checkpoint {folder} is incomplete: {one_line(problems)}; {REMEDY}")
    check_files(folder, values, at_most=_SMALL)
    return values


def check_files(
    folder: pathlib.Path,
    values: dict[str, Any],
    *,
    at_most: float = math.inf,
    update: Callable[[int], object] = lambda size: None,
) -> None:
    """Compare the files of a checkpoint with the digests of its manifest.

    Args:
        folder: the checkpoint.
        values: its manifest.
        at_most: leave out files of more bytes.
        update: called with the bytes of each file that was compared.

    Raises:
        InputError: naming each that differs; of a shard, also what is in it.
    """
    changed = []
    for name, file in values["files"].items():
        if file["bytes"] > at_most:
            continue
        if file_digest(folder / name) != file["sha256"]:
            shard = name.removeprefix("params/").partition("/")[0]
            held = [path for path, row in values["tensors"].items() if row["shard"] == shard]
            more = ", ..." if len(held) > 3 else ""
            changed.append(name + (f" (of {', '.join(held[:3])}{more})" if held else ""))
        update(file["bytes"])
    if changed:
        raise InputError(
            f"checkpoint {folder}: changed after being written: {one_line(changed)}; {REMEDY}"
        )


def file_sizes(folder: pathlib.Path) -> dict[str, int]:
    """Return the size of each file beneath a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def file_digest(path: pathlib.Path) -> str:
    """Return a file's SHA-256."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_digest(values: Any) -> str:
    """Return the SHA-256 of values as JSON without spaces, keys sorted."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
