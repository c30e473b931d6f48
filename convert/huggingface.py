"""Read a Llama 2 in the Hugging Face layout: config.json, and safetensors or PyTorch's pickles."""

import os
import pathlib
import reprlib
from typing import Any

import numpy as np

from convert import source
from convert.corruption import abbreviate
from convert.names import names
from convert.tensors import Header, read_headers
from llama_jax.config import ModelConfig, as_float
from llama_jax.errors import InputError, one_line
from llama_jax.strict_json import read_json

# The weights in one file, and the index of several; in the order that transformers prefers.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

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


def open_source(folder: pathlib.Path) -> source.Source:
    """Open a folder of config.json and its weights: one file, or an index and its shards.

    Raises:
        InputError: a file is missing or corrupted, or the model is no Llama 2.
    """
    source.check_folder(folder, ("config.json",), tuple(n for pair in _WEIGHTS for n in pair))
    config = read_config(folder / "config.json")
    found = _read_headers(folder)
    rows = {row.ours: row.huggingface for row in names(config.num_layers)}
    copy = rows.pop("lm_head") if config.tie_embeddings else ""
    headers = {name: header for name, (_, header) in found.items() if name != copy}

    def read(path: str) -> tuple[np.ndarray, list[source.Part]]:
        array, part = source.read_part(found[rows[path]][0], rows[path])
        if path == "embed" and copy in found:
            other, _ = source.read_part(found[copy][0], copy)
            if not source.same_bits(array, other):
                raise InputError(
                    f"{folder}: {copy} differs from {rows[path]}, but tie_word_embeddings is true; "
                    "set it to false in config.json if the model has an output layer of its own"
                )
        return array, [part]

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


def _read_headers(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, Header]]:
    """Return, for each tensor, the file that holds it and its header."""
    for weights, index in _WEIGHTS:
        if os.path.lexists(folder / weights):  # a broken link is to be named, not passed over
            headers = read_headers(folder / weights)
            return {
                name: (folder / weights, header)
                for name, header in headers.items()
                if not _is_buffer(name)
            }
        if os.path.lexists(folder / index):
            return _read_shards(folder / index)
    raise AssertionError("check_folder found one")


def _read_shards(index: pathlib.Path) -> dict[str, tuple[pathlib.Path, Header]]:
    placed = _weight_map(index)
    paths = {name: index.parent / name for name in sorted(set(placed.values()))}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        raise InputError(
            f"{index} names files that are missing: {abbreviate(missing)}; download them"
        )
    headers = {file: read_headers(path) for file, path in paths.items()}
    held = {(name, file) for file, tensors in headers.items() for name in tensors}
    problems = [f"{name} is not in {file}" for name, file in sorted(placed.items() - held)]
    problems += [
        f"{file} holds {name}, which the index places in {placed.get(name, 'no file')}"
        for name, file in sorted(held - placed.items())
        if not _is_buffer(name)
    ]
    if problems:
        raise InputError(
            f"{index} does not match its files: {abbreviate(problems)}; "
            "download the whole folder again"
        )
    return {
        name: (paths[file], headers[file][name])
        for name, file in placed.items()
        if not _is_buffer(name)
    }


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{index} has no weight_map; download it again")
    unexpected = [
        repr(file)
        for file in placed.values()
        if not isinstance(file, str) or pathlib.PurePath(file).name != file
    ]
    if unexpected:
        raise InputError(
            f"{index}: weight_map names {abbreviate(unexpected)}, expected files beside it"
        )
    return placed


def _is_buffer(name: str) -> bool:
    """Tell whether a tensor is the table of frequencies that old versions of transformers saved."""
    return name.endswith(".rotary_emb.inv_freq")
