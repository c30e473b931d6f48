"""Read a Llama 2 in Meta's layout: params.json and model-parallel shards of PyTorch's .pth."""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from convert import source
from convert.corruption import abbreviate
from convert.names import Name, names
from convert.state_dict import plain_names
from convert.tensors import Header, read_headers
from llama_jax.config import ModelConfig, as_float
from llama_jax.errors import InputError, one_line
from llama_jax.strict_json import read_json

_PARAMS = "params.json"
_SHARDS = "consolidated.*.pth"

# Meta's ModelArgs: what a key that params.json leaves out stands for; None: it must be there.
_DEFAULTS = {
    "dim": None,
    "n_layers": None,
    "n_heads": None,
    "n_kv_heads": None,  # n_heads
    "vocab_size": -1,  # that of the tokenizer
    "multiple_of": 256,
    "ffn_dim_multiplier": None,  # 1
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_scaled_rope": False,
}

_LARGEST = 2**24  # of the sizes in params.json; ModelConfig has narrower limits


class _Stored(NamedTuple):
    name: str
    """In the file."""
    header: Header


Shards = dict[str, dict[str, _Stored]]
"""From each file's name to what it holds, by Meta's name."""


def open_source(folder: pathlib.Path, max_seq_len: int) -> source.Source:
    """Open a folder of params.json and consolidated.*.pth.

    Args:
        folder: one of Meta's model folders.
        max_seq_len: the context the model was trained for, which Meta's files do not say.

    Raises:
        InputError: a file is missing or corrupted, the shards disagree, or the model is no Llama 2.
    """
    source.check_folder(folder, (_PARAMS,), (_SHARDS,))
    values = _read_params(folder / _PARAMS)
    shards = _open_shards(folder)
    layers, found = values["n_layers"], len(next(iter(shards.values())))
    if layers > found:  # to name the tensors of so many would take what memory there is
        raise InputError(
            f"{folder}: n_layers of {_PARAMS} is {layers:,}, but there are {found:,} tensors; "
            "download the whole folder again"
        )
    rows = {row.ours: row for row in names(layers)}
    headers = _merged_headers(folder, shards, rows)
    gate = rows["layer_0/feed_forward/gate"]
    _check_ffn_dim(folder, values, gate.meta, _outputs(folder, headers, gate))
    if values["vocab_size"] == -1:
        values["vocab_size"] = _outputs(folder, headers, rows["embed"])
    config = _config(folder / _PARAMS, values, max_seq_len)
    paths = {path: row.meta for path, row in rows.items()}

    def read(path: str) -> tuple[np.ndarray, list[source.Part]]:
        return _read(folder, rows[path], shards, config.head_dim)

    return source.Source(folder, config, paths, headers, read)


def _read_params(path: pathlib.Path) -> dict[str, Any]:
    """Return every key of `_DEFAULTS`, those that sizes are computed from checked."""
    found = read_json(path)
    values = _DEFAULTS | found
    problems = [f"unknown key {key!r:.40}" for key in sorted(found.keys() - _DEFAULTS.keys())]
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"):
        value = values[key]
        if key == "n_kv_heads" and value is None:
            values[key] = values["n_heads"]
        elif type(value) is not int or not 1 <= value <= _LARGEST:
            got = f"{value!r:.40}" if key in found else "missing"
            problems.append(f"{key} is {got}, expected a whole number from 1 to {_LARGEST:,}")
    factor = values["ffn_dim_multiplier"]
    if factor is not None and (type(factor) not in (int, float) or not 0 < factor < 100):
        problems.append(f"ffn_dim_multiplier is {factor!r:.40}, expected a positive number")
    if values["use_scaled_rope"] is not False:
        problems.append(f"use_scaled_rope is {values['use_scaled_rope']!r:.40}, expected false")
    if problems:
        raise InputError(f"{path}: {one_line(problems)}; only a plain Llama 2 can be converted")
    return values


def _config(path: pathlib.Path, values: dict[str, Any], max_seq_len: int) -> ModelConfig:
    try:
        return ModelConfig(
            vocab_size=values["vocab_size"],
            dim=values["dim"],
            ffn_dim=_ffn_dim(values),
            num_layers=values["n_layers"],
            num_heads=values["n_heads"],
            num_kv_heads=values["n_kv_heads"],
            norm_eps=as_float(values["norm_eps"]),
            rope_theta=as_float(values["rope_theta"]),
            max_seq_len=max_seq_len,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _ffn_dim(values: dict[str, Any]) -> int:
    """Return the feed-forward width by the formula of Meta's FeedForward."""
    width = 2 * (4 * values["dim"]) // 3
    if values["ffn_dim_multiplier"] is not None:
        width = int(values["ffn_dim_multiplier"] * width)
    return -(-width // values["multiple_of"]) * values["multiple_of"]


def _check_ffn_dim(folder: pathlib.Path, values: dict[str, Any], name: str, outputs: int) -> None:
    """Compare the shards' width with the formula's: the one sign that the last shard is missing."""
    if outputs != _ffn_dim(values):
        raise InputError(
            f"{folder}: {name} has {outputs} outputs in all shards, but dim, multiple_of and "
            f"ffn_dim_multiplier of {_PARAMS} make {_ffn_dim(values)}; a shard is missing, or the "
            "file is another model's"
        )


def _outputs(folder: pathlib.Path, headers: dict[str, Header], row: Name) -> int:
    header = headers.get(row.meta)
    if header is None or len(header.shape) != 2:
        got = "missing" if header is None else f"of shape {list(header.shape)}"
        raise InputError(
            f"{folder}: {row.meta} is {got}, expected a matrix; download the whole folder again"
        )
    return header.shape[0]


def _open_shards(folder: pathlib.Path) -> Shards:
    paths = sorted(folder.glob(_SHARDS))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    problems = [f"unexpected {p.name}" for p in paths if not re.search(r"\.\d\d\.pth$", p.name)]
    problems += [f"missing {name}" for name in expected if not (folder / name).exists()]
    if problems:
        raise InputError(
            f"{folder}: shards are not numbered consecutively from 00: {one_line(problems)}; "
            "download what is missing"
        )
    shards = {}
    for path in paths:
        headers = read_headers(path)
        plain = plain_names(headers, str(path))
        shards[path.name] = {own: _Stored(name, headers[name]) for own, name in plain.items()}
    first, *others = shards
    problems = []
    for other in others:
        lacking = shards[first].keys() - shards[other].keys()
        unexpected = shards[other].keys() - shards[first].keys()
        problems += [f"{other} lacks {abbreviate(sorted(lacking))}"] if lacking else []
        problems += [f"{other} alone has {abbreviate(sorted(unexpected))}"] if unexpected else []
    if problems:
        raise InputError(
            f"{folder}: shards hold different tensors than {first}: {one_line(problems)}; "
            "download the whole folder again"
        )
    return shards


def _merged_headers(
    folder: pathlib.Path, shards: Shards, rows: dict[str, Name]
) -> dict[str, Header]:
    """Return each tensor's shape and dtype once its shards are put together."""
    axes = {row.meta: row.shard_axis for row in rows.values()}
    headers, problems = {}, []
    for name in next(iter(shards.values())):
        parts = [shard[name].header for shard in shards.values()]
        axis = axes.get(name)
        shape = list(parts[0].shape)
        if axis is not None and axis < len(shape):
            shape[axis] *= len(parts)
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            seen = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
            problems.append(f"{name} is {seen}")
        headers[name] = Header(tuple(shape), parts[0].dtype)
    if problems:
        raise InputError(
            f"{folder}: shards have different shapes or dtypes: {abbreviate(problems)}; "
            "download the whole folder again"
        )
    return headers


def _read(
    folder: pathlib.Path, row: Name, shards: Shards, head_dim: int
) -> tuple[np.ndarray, list[source.Part]]:
    read = [source.read_part(folder / file, held[row.meta].name) for file, held in shards.items()]
    arrays, parts = [array for array, _ in read], [part for _, part in read]
    if row.shard_axis is None:
        for array, part in read:
            if not source.same_bits(array, arrays[0]):
                raise InputError(
                    f"{row.meta} of {part['file']} differs from that of {parts[0]['file']}, "
                    "expected a copy: the shards belong to different models; download the whole "
                    "folder again"
                )
        return arrays[0], parts
    array = np.concatenate(arrays, row.shard_axis) if len(arrays) > 1 else arrays[0]
    return _halves(array, head_dim) if row.rotary else array, parts


def _halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Move the outputs of each head from rotary pairs to halves."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
