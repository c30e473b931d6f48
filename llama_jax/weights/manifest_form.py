"""The form of a manifest: its fields, their types and their ranges."""

import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.weights.dtypes import DTYPES

REMEDY = "copy or convert the checkpoint again"

_FIELDS = {
    "converter": str,
    "dtype": str,
    "origin": dict,
    "root": str,
    "tensors": dict,
    "files": dict,
}
_ROWS = {
    "tensors": {"shape": list, "sha256": str, "shard": str},
    "files": {"bytes": int, "sha256": str},
}
"""Of each row of these fields."""
_KINDS = {dict: "an object", int: "an integer", list: "a list", str: "a string"}

_MAX_SIZE = 2**31  # of one axis
_MAX_BYTES = 2**63  # of a file


class _Range(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


def _is_shape(value: list[Any]) -> bool:
    return len(value) in (1, 2) and all(type(n) is int and 0 < n < _MAX_SIZE for n in value)


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text) is not None


_SHA256 = _Range(_matches("[0-9a-f]{64}"), "64 hexadecimal digits")
_RANGES = {
    "dtype": _Range(lambda name: name in DTYPES, f"one of {', '.join(DTYPES)}"),
    "root": _SHA256,
    "sha256": _SHA256,
    "shape": _Range(_is_shape, "one or two positive sizes"),
    "shard": _Range(_matches("[0-9]{5,9}"), "a folder of params, such as 00000"),
    "bytes": _Range(lambda size: 0 <= size < _MAX_BYTES, "a file's size"),
}


def check_form(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Refuse a manifest that another program wrote: its digest is right, its form is not.

    Every field has its type and lies in its range afterwards, and every file lies in the
    checkpoint's folder.

    Raises:
        InputError: naming the first field that does not.
    """
    _check_object(path, "", values, _FIELDS)
    for name, fields in _ROWS.items():
        for key, row in values[name].items():
            _check_object(path, f"{name}[{key!r:.80}]", row, fields)
    for name in values["files"]:
        if not _is_inside(name):
            raise InputError(
                f"{path}: files[{name!r:.80}] is not the path of a file in the folder; {REMEDY}"
            )
    _check_shards(path, values)


def _check_object(path: pathlib.Path, name: str, value: Any, fields: dict[str, type]) -> None:
    """Refuse a value that is no object with these fields of these types, in their ranges."""
    where = f"{path}: {name}".removesuffix(": ")
    if type(value) is not dict:
        raise InputError(f"{where} is {value!r:.40}, expected an object; {REMEDY}")
    for field, kind in fields.items():
        if field not in value:
            raise InputError(f"{where} has no {field}, expected {_KINDS[kind]}; {REMEDY}")
        if type(value[field]) is not kind:  # isinstance would take true for an integer
            raise InputError(
                f"{where}: {field} is {value[field]!r:.40}, expected {_KINDS[kind]}; {REMEDY}"
            )
    for field in fields.keys() & _RANGES.keys():
        if not _RANGES[field].holds(value[field]):
            expected = _RANGES[field].expected
            raise InputError(
                f"{where}: {field} is {value[field]!r:.40}, expected {expected}; {REMEDY}"
            )


def _is_inside(name: str) -> bool:
    """Whether a file's name is a path below the folder, in the form that is written."""
    return not {"\0", "\\"} & {*name} and not {"", ".", ".."} & {*name.split("/")}


def _check_shards(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Refuse tensors whose shard has no files, and a config without a digest."""
    held = {"/".join(name.split("/")[:2]) for name in values["files"] if name.count("/") > 1}
    lacking = {f"params/{row['shard']}" for row in values["tensors"].values()} - held
    if "config.json" not in values["files"]:
        lacking.add("config.json")
    if lacking:
        raise InputError(f"{path}: files has no {min(lacking)}; {REMEDY}")


def check_links(folder: pathlib.Path) -> None:
    """Refuse a checkpoint with links that lead out of it, or with pipes, sockets and devices.

    Orbax opens what it finds in a shard's folder.

    Raises:
        InputError: naming the first one.
        OSError: the folder cannot be read.
    """
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not _resolves_into(path, root):
            raise InputError(
                f"{path} is a link out of the checkpoint, expected the file itself; copy it there"
            )
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is neither a file nor a folder; {REMEDY}")


def _resolves_into(path: pathlib.Path, root: pathlib.Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # a broken link, a circle
        return False
