"""Array sizes: those of a manifest against the config's, and against the files."""

import collections
import pathlib
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, one_line
from llama_jax.nn.shapes import num_arrays, param_dtype, shapes_by_path
from llama_jax.weights.manifest import stored_bytes, tensor_dtype

_MOST_COMPRESSED = 16
"""Bytes of arrays for one of their files. Earlier versions compressed them: by a tenth, or to a
third where they hold bfloat16 in float32."""


def check_arrays(path: pathlib.Path, values: dict[str, Any], config: ModelConfig) -> None:
    """Compare the arrays with the config, and their bytes with those of the files they are in.

    Nothing is allocated: sizes from outside could ask for any amount of memory.

    Args:
        path: the checkpoint, for errors.
        values: its manifest, as read.
        config: of its config.json.

    Raises:
        InputError: naming what does not fit.
    """
    rows, dtype = values["tensors"], values["dtype"]
    # The number first: to list the shapes of a million layers takes a gigabyte.
    if len(rows) != num_arrays(config) or {
        name: (tuple(row["shape"]), tensor_dtype(row, values)) for name, row in rows.items()
    } != {
        name: (shape, param_dtype(name, config, dtype))
        for name, shape in shapes_by_path(config).items()
    }:
        raise InputError(
            f"checkpoint {path}: the arrays do not fit config.json; convert the weights again"
        )
    held, needed = collections.Counter[str](), collections.Counter[str]()
    for name, file in values["files"].items():
        folder, *shard = name.split("/")[:2]
        if folder == "params" and shard:
            held[shard[0]] += file["bytes"]
    for row in rows.values():
        needed[row["shard"]] += stored_bytes(row, values)
    problems = [
        f"params/{shard} has {held[shard]:,} bytes for {size:,}"
        for shard, size in needed.items()
        if size > _MOST_COMPRESSED * held[shard]
    ]
    if problems:
        raise InputError(
            f"checkpoint {path}: files are smaller than their arrays: {one_line(problems)}; copy "
            "or convert it again"
        )
