"""What both readers give, and the checks and conversions that are the same for both."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import DTYPES
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, one_line
from llama_jax.model import Params, param_shapes
from llama_jax.tokenizer import Tokenizer

_LISTED = 8  # of many names, an error shows these


@dataclasses.dataclass(frozen=True)
class Header:
    """A tensor as its file declares it; the data is not read."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of published weights, opened: headers are read, data is not."""

    folder: pathlib.Path
    config: ModelConfig
    names: dict[str, str]
    """From each parameter's path, such as `layer_0/attention/q`, to the source's name for it."""
    headers: dict[str, Header]
    """Every tensor found, by the source's name, its shards taken together."""
    read: Callable[[str], np.ndarray]
    """Read the parameter of one path, in our layout and the source's dtype."""


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


def damaged(path: pathlib.Path, kind: str) -> InputError:
    """Return the error for a file that its format's reader refused, saying what it looks like."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        return InputError(f"{path}: cannot read it ({error.strerror})")
    if not start:
        return InputError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        return InputError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if start.lstrip().startswith(b"<"):
        return InputError(
            f"{path} is an HTML page, not weights: the download link expired or wanted a login; "
            "download it again"
        )
    return InputError(
        f"{path} is no {kind} or is cut short ({size:,} bytes, starts with {start[:8]!r}); "
        "download it again"
    )


def abbreviate(items: Iterable[str]) -> str:
    """Join the first few items and count the rest."""
    items = list(items)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def check_tensors(source: Source) -> None:
    """Compare every name, shape and dtype with what the config asks for.

    Raises:
        InputError: listing all that is missing, unexpected or of another shape.
    """
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(source.config))
    shapes = {jax.tree_util.keystr(k, simple=True, separator="/"): v.shape for k, v in leaves}
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


def find_tokenizer(source: Source, *folders: pathlib.Path) -> pathlib.Path | None:
    """Return the first tokenizer.model in `folders`; it must have a piece for each embedding.

    Raises:
        InputError: it is no Llama 2 tokenizer, or another model's.
    """
    candidates = [folder / "tokenizer.model" for folder in folders]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        return None
    pieces = Tokenizer(path).vocab_size
    if pieces != source.config.vocab_size:
        raise InputError(
            f"{path} has {pieces:,} pieces, the model's vocab_size is "
            f"{source.config.vocab_size:,}; copy the tokenizer.model that belongs to these weights"
        )
    return path


def read_params(source: Source, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each parameter's path and its array in `dtype`, reading one tensor at a time."""
    for path, name in source.names.items():
        yield path, _cast(name, source.read(path), jnp.dtype(dtype))


def nest(params: Iterable[tuple[str, np.ndarray]]) -> Params:
    """Build the model's nested dict from paths and arrays."""
    tree: Params = {}
    for path, array in params:
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two arrays hold the same bytes, NaN and signed zeros included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    finite = np.isfinite(array)
    if not finite.all():
        count = array.size - np.count_nonzero(finite)
        raise InputError(
            f"{name} holds NaN or infinity in {count:,} of {array.size:,} values; "
            "the file is damaged, download it again"
        )
    with np.errstate(over="ignore"):  # checked below, with a message that names the tensor
        cast = np.ascontiguousarray(array).astype(dtype, copy=False)
    if dtype != array.dtype and not np.isfinite(cast).all():
        largest = np.abs(array.astype(np.float32)).max()
        raise InputError(
            f"{name} does not fit {dtype}: its largest value is {largest:,.8g}, {dtype} ends at "
            f"{float(jnp.finfo(dtype).max):,.8g}; choose another --dtype"
        )
    return cast
