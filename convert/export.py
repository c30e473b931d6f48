"""Write a checkpoint in the Hugging Face layout: config.json, safetensors, tokenizer.model."""

import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from convert.names import names
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import BOS_ID, transformers_config
from llama_jax.weights.atomic_directory import atomic_directory
from llama_jax.weights.checkpoint import open_checkpoint, read_tensors
from llama_jax.weights.shards import Tensor, group

_FILE_BYTES = 2**29  # little in memory at a time


def export_hf(path: pathlib.Path, out: pathlib.Path, *, progress: bool = False) -> int:
    """Export a checkpoint as a folder that transformers loads: whole, or not there.

    Every tensor is compared with the manifest's digest on the way.

    Args:
        path: a checkpoint.
        out: a folder that does not exist yet.
        progress: show a bar on stderr.

    Returns:
        The number of bytes of weights.

    Raises:
        InputError: as `load_checkpoint`; it is quantized; `out` exists; a tensor differs from the
            manifest.
    """
    path = path.expanduser().absolute()
    values, config = open_checkpoint(path)
    if config.is_quantized:
        raise InputError(
            f"checkpoint {path} is {config.label}, which transformers does not read so; export the "
            "one that it was made of"
        )
    with atomic_directory(out) as folder:
        size = write_hf(folder, read_tensors(path, progress=progress), config, values["dtype"])
        if "tokenizer.model" in values["files"]:
            shutil.copyfile(path / "tokenizer.model", folder / "tokenizer.model")
            _write_json(folder / "tokenizer_config.json", transformers_config(config.max_seq_len))
    return size


def write_hf(
    folder: pathlib.Path, tensors: Iterable[Tensor], config: ModelConfig, dtype: str
) -> int:
    """Write config.json and safetensors into a folder; return the number of bytes of weights.

    Args:
        folder: an empty one.
        tensors: every parameter, by our paths; only one file's are in memory at a time.
        config: their shape.
        dtype: theirs.
    """
    rows = {row.ours: row.huggingface for row in names(config.num_layers)}
    placed, total = {}, 0
    files_written: list[pathlib.Path] = []
    for shard in group(tensors, _FILE_BYTES):
        file = folder / f"{len(files_written):05}"
        named = {rows[t.path]: t.array for t in shard}
        try:
            safetensors.numpy.save_file(named, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: is the disk full? {error}") from error
        files_written.append(file)
        placed |= dict.fromkeys(named, len(files_written))
        total += sum(t.array.nbytes for t in shard)
        del shard, named  # before the next is read
    _place(folder, files_written, placed, total)
    _write_json(folder / "config.json", _config(config, dtype))
    special_ids = {"bos_token_id": BOS_ID, "eos_token_id": _eos_tokens(config)}
    _write_json(folder / "generation_config.json", special_ids)
    return total


def _place(
    folder: pathlib.Path, files_written: list[pathlib.Path], placed: dict[str, int], total: int
) -> None:
    """Give the files the names that transformers looks for, now that their number is known."""
    if len(files_written) == 1:
        files_written[0].rename(folder / "model.safetensors")
        return
    files = [
        f"model-{i:05}-of-{len(files_written):05}.safetensors"
        for i, _ in enumerate(files_written, start=1)
    ]
    for file, name in zip(files_written, files, strict=True):
        file.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: files[i - 1] for name, i in placed.items()},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": _eos_tokens(config),
        "torch_dtype": dtype,
        **_scaling(config),
    }


def _eos_tokens(config: ModelConfig) -> int | list[int]:
    """Return the end tokens as transformers has them: one by itself."""
    first, *others = config.eos_tokens
    return [first, *others] if others else first


def _scaling(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of linear scaling; the context before it tells readers which is which."""
    if config.rope_factor == 1:
        return {}
    rope = {"rope_type": "linear", "factor": config.rope_factor}
    before = max(1, int(config.max_seq_len / config.rope_factor))
    return {"rope_scaling": rope | {"original_max_position_embeddings": before}}


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
