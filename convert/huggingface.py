"""Read a Llama 2 in the Hugging Face layout: config.json, and safetensors or PyTorch's pickles."""

import dataclasses
import os
import pathlib
import reprlib
from typing import Any

import numpy as np

from convert import hf_files, source
from convert.names import names
from convert.recognition import refuse_other_kinds
from llama_jax.config import LARGEST, ModelConfig, as_float
from llama_jax.errors import InputError, one_line
from llama_jax.strict_json import read_json
from llama_jax.text.tokenizer import EOS_ID, most_unnamed

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
}
_ROPE_THETA = 10000.0


def open_source(folder: pathlib.Path, max_seq_len: int | None = None) -> source.Source:
    """Open a folder of config.json and its weights: one file, or several.

    Args:
        folder: the source.
        max_seq_len: the context, in place of the config's.

    Raises:
        InputError: a file is missing or corrupted, or the model is no Llama 2.
    """
    refuse_other_kinds(folder)
    source.check_folder(folder, ("config.json",), hf_files.PATTERNS)
    config = read_config(folder / "config.json", max_seq_len)
    found = hf_files.read_all_headers(folder)
    config = dataclasses.replace(config, vocab_size=_rows(config, found))
    rows = {row.ours: row.huggingface for row in names(config.num_layers)}
    copy = rows.pop("lm_head") if config.tie_embeddings else ""
    headers = {name: stored.header for name, stored in found.items() if name != copy}

    def read(path: str) -> tuple[np.ndarray, list[source.Part]]:
        array, part = source.read_part(*found[rows[path]][:2])
        if path == "embed" and copy in found:
            other, _ = source.read_part(*found[copy][:2])
            if not source.same_bits(array, other):
                raise InputError(
                    f"{folder}: {copy} differs from {rows[path]}, but tie_word_embeddings is true; "
                    "set it to false in config.json if the model has an output layer of its own"
                )
        return array, [part]

    return source.Source(folder, config, rows, headers, read)


def _rows(config: ModelConfig, found: dict[str, hf_files.Stored]) -> int:
    """Return the rows of the embedding, which transformers 4.32 padded beyond its vocab_size."""
    tables = [
        found[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in found
    ]
    rows = {table.header.shape[0] if table.header.shape else 0 for table in tables}
    if len(rows) != 1:
        return config.vocab_size  # check_tensors describes it
    [size] = rows
    padded = config.vocab_size < size <= config.vocab_size + most_unnamed(config.vocab_size)
    return size if padded else config.vocab_size


def read_config(path: pathlib.Path, max_seq_len: int | None = None) -> ModelConfig:
    """Translate a transformers config.json, of any version, and the end tokens beside it.

    Args:
        path: config.json.
        max_seq_len: the context, in place of the config's.

    Raises:
        InputError: listing every setting that the model cannot honour.
    """
    values = _DEFAULTS | read_json(path)
    problems = [
        f"{key} is {reprlib.repr(values.get(key, default))}, expected {only!r}"
        for key, (default, only) in _FIXED.items()
        if values.get(key, default) != only
    ]
    theta, factor, rope_problems = _rope(values)
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
        "max_seq_len": max_seq_len or _context(values, factor),
        "tie_embeddings": values["tie_word_embeddings"],
        "rope_factor": as_float(factor),
        "eos_tokens": _eos_tokens(path, values),
    }
    config = None
    try:
        config = ModelConfig(**fields)
    except InputError as error:
        problems.append(str(error))
    head_dim = values.get("head_dim")
    if config and head_dim not in (None, config.head_dim):
        problems.append(
            f"head_dim is {head_dim!r:.40}, expected hidden_size / num_attention_heads = "
            f"{config.dim} / {config.num_heads} = {config.head_dim}"
        )
    if config is None or problems:
        raise InputError(f"{path}: {one_line(problems)}; only a plain Llama 2 can be converted")
    return config


def pad_token(folder: pathlib.Path) -> int | None:
    """Return the id of the padding token by config.json; None: it has none."""
    path = folder / "config.json"
    found = read_json(path).get("pad_token_id") if os.path.lexists(path) else None
    return found if type(found) is int else None


def _rope(values: dict[str, Any]) -> tuple[Any, Any, list[str]]:
    """Return the base and the factor of the rotary positions, and what is wrong.

    Both may be written in rope_scaling and in rope_parameters, the base also beside them.
    """
    thetas = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    factors: dict[str, Any] = {}
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict) or not _is_supported(rope):
            problems.append(f"{key} is {rope!s:.100}, expected none, or the type default or linear")
            continue
        if "rope_theta" in rope:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
        if "factor" in rope:
            factors[f"{key}.factor"] = rope["factor"]
    for name, found in (("rope_theta", thetas), ("the factor of the positions", factors)):
        if len({*map(repr, map(as_float, found.values()))}) > 1:
            written = ", ".join(f"{key} {value!r:.40}" for key, value in found.items())
            problems.append(f"{name} has several values ({written}), expected one")
    return next(iter(thetas.values()), _ROPE_THETA), next(iter(factors.values()), 1.0), problems


def _is_supported(rope: dict[str, Any]) -> bool:
    """Whether positions are used as they are, or all divided by one factor."""
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
    others = rope.keys() - {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0
    if all(kind == "default" for kind in kinds):
        return whole and rope.get("factor", 1.0) == 1.0 and not others
    # The length before scaling says nothing more: it is the context divided by the factor.
    return (
        whole
        and all(kind == "linear" for kind in kinds)
        and others <= {"original_max_position_embeddings"}
    )


def _context(values: dict[str, Any], factor: Any) -> Any:
    """Return the context: max_position_embeddings is often what it was before linear scaling."""
    given, length = values.get("max_sequence_length"), values["max_position_embeddings"]
    if given is not None or type(length) is not int or type(factor) not in (int, float):
        return length if given is None else given
    ropes = [values.get("rope_scaling") or {}, values.get("rope_parameters") or {}]
    scaled = any(isinstance(r, dict) and "original_max_position_embeddings" in r for r in ropes)
    # A length beyond the largest is refused as it is: its product could exceed a float.
    return length if scaled or length > LARGEST["max_seq_len"] else int(length * factor)


def _eos_tokens(path: pathlib.Path, values: dict[str, Any]) -> Any:
    """Return the end tokens of generation_config.json, else of config.json, else Llama 2's."""
    beside = path.with_name("generation_config.json")
    for found in (read_json(beside) if os.path.lexists(beside) else {}, values):
        tokens = found.get("eos_token_id")
        if tokens is not None:
            return tuple(tokens) if isinstance(tokens, list) else (tokens,)
    return (EOS_ID,)
