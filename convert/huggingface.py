"""Read a Llama 2 in the Hugging Face layout: config.json and safetensors."""

import pathlib
import reprlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from convert import source
from convert.names import names
from llama_jax.config import ModelConfig, as_float
from llama_jax.errors import InputError, one_line
from llama_jax.files import read_json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# transformers' LlamaConfig: what a key that config.json leaves out stands for.
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# What the model has no switch for: (default, the only value it can run).
_FIXED = {
    "model_type": (None, "llama"),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "quantization_config": (None, None),
    "partial_rotary_factor": (1.0, 1.0),
    "bos_token_id": (1, 1),
    "eos_token_id": (2, 2),
}
# What may stand beside rope_theta in rope_scaling and rope_parameters: no scaling at all.
_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
_ROPE_THETA = 10000.0
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_source(folder: pathlib.Path) -> source.Source:
    """Open a folder of config.json and model.safetensors, or its index and shards.

    Raises:
        InputError: a file is missing or damaged, or the model is no Llama 2.
    """
    source.check_folder(folder, ("config.json",), (_WEIGHTS, _INDEX))
    config = read_config(folder / "config.json")
    files = _open_tensors(folder)
    headers = {name: _header(file, name) for name, file in files.items()}
    rows = {row.ours: row.huggingface for row in names(config.num_layers)}
    copy = rows.pop("lm_head") if config.tie_embeddings else ""
    headers.pop(copy, None)

    def read(path: str) -> np.ndarray:
        array = files[rows[path]].get_tensor(rows[path])
        tied = path == "embed" and copy in files
        if tied and not source.same_bits(array, files[copy].get_tensor(copy)):
            raise InputError(
                f"{folder}: {copy} differs from {rows[path]}, but tie_word_embeddings is true; "
                "set it to false in config.json if the model has an output layer of its own"
            )
        return array

    return source.Source(folder, config, rows, headers, read)


def read_config(path: pathlib.Path) -> ModelConfig:
    """Translate a transformers config.json, of any version.

    Raises:
        InputError: listing every setting that the model cannot honour.
    """
    values = _DEFAULTS | read_json(path)
    if values.get("eos_token_id") == [2]:
        values["eos_token_id"] = 2
    problems = [
        f"{key} is {reprlib.repr(values.get(key, default))}, expected {only!r}"
        for key, (default, only) in _FIXED.items()
        if values.get(key, default) != only
    ]
    theta, rope_problems = _rope_theta(values)
    problems += rope_problems
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    fields: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "dim": values["hidden_size"],
        "ffn_dim": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "norm_eps": as_float(values["rms_norm_eps"]),
        "rope_theta": as_float(theta),
        "max_seq_len": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
    }
    config = None
    try:
        config = ModelConfig(**fields)
    except InputError as error:
        problems.append(str(error))
    head_dim = values.get("head_dim")
    if config and head_dim not in (None, config.head_dim):
        problems.append(
            f"head_dim is {head_dim}, expected hidden_size / num_attention_heads = "
            f"{config.dim} / {config.num_heads} = {config.head_dim}"
        )
    if config is None or problems:
        raise InputError(f"{path}: {one_line(problems)}; only a plain Llama 2 can be converted")
    return config


def _rope_theta(values: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the base of the rotary frequencies, wherever it is written, and what is wrong."""
    found = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict) or any(
            _ROPE.get(name) != value for name, value in rope.items() if name != "rope_theta"
        ):
            problems.append(f"{key} is {rope}, expected none or rope_type 'default'")
        elif "rope_theta" in rope:
            found[f"{key}.rope_theta"] = rope["rope_theta"]
    theta = list(found.values()) or [_ROPE_THETA]
    if any(value != theta[0] for value in theta):
        written = ", ".join(f"{key} {value}" for key, value in found.items())
        problems.append(f"rope_theta has several values ({written}), expected one")
    return theta[0], problems


def _open_tensors(folder: pathlib.Path) -> dict[str, Any]:
    """Return, for each tensor, the open file that holds it."""
    if (folder / _WEIGHTS).exists():  # the one that transformers prefers too
        file = _open_file(folder / _WEIGHTS)
        return {name: file for name in file.keys() if not _is_buffer(name)}  # noqa: SIM118 (no dict)
    index = folder / _INDEX
    placed = _weight_map(index)
    paths = {name: folder / name for name in sorted(set(placed.values()))}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        raise InputError(
            f"{index} names files that are missing: {source.abbreviate(missing)}; download them"
        )
    opened = {name: _open_file(path) for name, path in paths.items()}
    held = {(name, file) for file, handle in opened.items() for name in handle.keys()}  # noqa: SIM118 (no dict)
    problems = [f"{name} is not in {file}" for name, file in sorted(placed.items() - held)]
    problems += [
        f"{file} holds {name}, which the index places in {placed.get(name, 'no file')}"
        for name, file in sorted(held - placed.items())
        if not _is_buffer(name)
    ]
    if problems:
        raise InputError(
            f"{index} does not match its files: {source.abbreviate(problems)}; "
            "download the whole folder again"
        )
    return {name: opened[file] for name, file in placed.items() if not _is_buffer(name)}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{index} has no weight_map; download it again")
    strange = [
        repr(file)
        for file in placed.values()
        if not isinstance(file, str) or pathlib.PurePath(file).name != file
    ]
    if strange:
        raise InputError(
            f"{index}: weight_map names {source.abbreviate(strange)}, expected files beside it"
        )
    return placed


def _is_buffer(name: str) -> bool:
    """Tell whether a tensor is the table of frequencies that old versions of transformers saved."""
    return name.endswith(".rotary_emb.inv_freq")


def _open_file(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError):
        raise source.damaged(path, "safetensors file") from None


def _header(file: Any, name: str) -> source.Header:
    view = file.get_slice(name)
    dtype = str(view.get_dtype())
    return source.Header(tuple(view.get_shape()), _DTYPES.get(dtype, dtype))
