"""The common interface of both readers, with the checks and conversions they share."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import TypedDict

import jax.numpy as jnp
import numpy as np

from convert.corruption import abbreviate
from convert.tensors import Header, read_tensor
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, one_line
from llama_jax.nn.shapes import shapes_by_path
from llama_jax.weights.dtypes import DTYPES
from llama_jax.weights.manifest import array_digest
from llama_jax.weights.shards import Tensor

ROUNDING = ("rounded", "subnormal", "to zero", "beyond the largest")
"""How values change in a narrower dtype. Rounded: every changed value, including those that went to
zero or exceed the largest. Subnormal: below the smallest normal number, changed or not."""

_BLOCK = 2**22  # values cast at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of published weights, opened: headers are read, data is not."""

    folder: pathlib.Path
    config: ModelConfig
    names: dict[str, str]
    """From each parameter's path, such as `layer_0/attention/q`, to the source's name for it."""
    headers: dict[str, Header]
    """Every tensor found, by the source's name, its shards taken together."""
    read: Callable[[str], tuple[np.ndarray, list["Part"]]]
    """Read the parameter of one path in our layout and the source's dtype, and its origin."""


class Part(TypedDict):
    """A tensor of a file that a parameter was read from: a row of the manifest's `sources`."""

    file: str
    name: str
    shape: list[int]
    dtype: str
    sha256: str
    """Of its bytes there."""


def read_part(path: pathlib.Path, name: str) -> tuple[np.ndarray, Part]:
    """Read one tensor of one file."""
    array = read_tensor(path, name)
    return array, Part(
        file=path.name,
        name=name,
        shape=list(array.shape),
        dtype=str(array.dtype),
        sha256=array_digest(array),
    )


def check_folder(folder: pathlib.Path, *needed: tuple[str, ...]) -> None:
    """Refuse a folder that lacks a file.

    Args:
        folder: the source.
        needed: groups of glob patterns; a file must match one of each group.

    Raises:
        InputError: naming what was looked for.
    """
    wanted = [" or ".join(patterns) for patterns in needed]
    expected = f"expected a folder with {' and '.join(wanted)}"
    if not folder.exists():
        raise InputError(f"{folder} does not exist; {expected}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; {expected}")
    missing = [
        f"no {text}"
        for text, patterns in zip(wanted, needed, strict=True)
        if not any(any(folder.glob(pattern)) for pattern in patterns)
    ]
    if missing:
        raise InputError(f"{folder} has {' and '.join(missing)}; {expected}")


def check_tensors(source: Source) -> None:
    """Compare every name, shape and dtype with what the config asks for.

    Raises:
        InputError: listing all that is missing, unexpected or of another shape.
    """
    shapes = shapes_by_path(source.config)
    assert shapes.keys() == source.names.keys(), "names.py and the model disagree"
    expected = {source.names[path]: shape for path, shape in shapes.items()}
    found = source.headers
    groups = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "wrong shape": [
            f"{name} is {list(found[name].shape)}, expected {list(expected[name])}"
            for name in expected.keys() & found.keys()
            if found[name].shape != expected[name]
        ],
        f"wrong dtype (expected {', '.join(DTYPES)})": [
            f"{name} is {found[name].dtype}"
            for name in expected.keys() & found.keys()
            if found[name].dtype not in DTYPES
        ],
    }
    problems = [f"{what}: {abbreviate(sorted(items))}" for what, items in groups.items() if items]
    if problems:
        raise InputError(
            f"{source.folder}: the tensors are not those of a Llama of this config: "
            f"{one_line(problems)}; download the whole folder again"
        )


def target_dtype(source: Source, choice: str) -> str:
    """Return the dtype to store: `choice`, or for "source" the one that every tensor has."""
    if choice != "source":
        return choice
    counts = collections.Counter(source.headers[name].dtype for name in source.names.values())
    if len(counts) > 1:
        several = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
        raise InputError(f"{source.folder} mixes dtypes ({several}); choose one with --dtype")
    return next(iter(counts))


def read_params(source: Source, dtype: str, *, saturate: bool = False) -> Iterator[Tensor]:
    """Yield each parameter in `dtype`, reading one tensor at a time.

    Args:
        source: where from.
        dtype: one of DTYPES.
        saturate: store the largest value there is for what exceeds it, instead of refusing.
    """
    for path, name in source.names.items():
        yield _read_param(source, path, name, jnp.dtype(dtype), saturate)


def _read_param(source: Source, path: str, name: str, dtype: np.dtype, saturate: bool) -> Tensor:
    array, parts = source.read(path)
    cast, rounding = _cast(name, array, dtype, saturate)
    return Tensor(path, cast, {"sources": parts} | ({"rounding": rounding} if rounding else {}))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two arrays hold the same bytes, NaN and signed zeros included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def _cast(
    name: str, array: np.ndarray, dtype: np.dtype, saturate: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the array in `dtype`, and counts of what became of its values (ROUNDING)."""
    source = np.ascontiguousarray(array).reshape(-1)
    exact = np.can_cast(source.dtype, dtype) or dtype == np.float32
    stored = source if dtype == source.dtype else np.empty(source.shape, dtype)
    limits = jnp.finfo(dtype)
    largest, smallest = float(limits.max), float(limits.smallest_normal)
    counts: collections.Counter[str] = collections.Counter()
    non_finite, highest = 0, 0.0
    for start in range(0, source.size, _BLOCK):
        block = source[start : start + _BLOCK].astype(np.float32)
        non_finite += block.size - int(np.count_nonzero(np.isfinite(block)))
        if stored is source:
            continue
        with np.errstate(over="ignore"):  # counted below
            cast = block.astype(dtype)
        if not exact:
            size, wide = np.abs(block), cast.astype(np.float32)
            beyond = ~np.isfinite(wide)
            highest = max(highest, float(size.max()))
            if beyond.any():
                cast = np.where(beyond, np.copysign(largest, block), wide).astype(dtype)
            counts["rounded"] += int(np.count_nonzero(wide != block))
            counts["subnormal"] += int(np.count_nonzero((size < smallest) & (wide != 0)))
            counts["to zero"] += int(np.count_nonzero((wide == 0) & (block != 0)))
            counts["beyond the largest"] += int(np.count_nonzero(beyond))
        stored[start : start + _BLOCK] = cast
    if non_finite:
        raise InputError(
            f"{name} holds NaN or infinity in {non_finite:,} of {source.size:,} values; "
            "the file is corrupted, download it again"
        )
    if counts["beyond the largest"] and not saturate:
        raise InputError(
            f"{name} does not fit {dtype}: its largest value is {highest:,.8g}, {dtype} ends at "
            f"{largest:,.8g}; choose another --dtype, or --saturate to store {largest:,.8g}"
        )
    return stored.reshape(array.shape), {what: counts[what] for what in ROUNDING if counts[what]}
