"""Published layouts of known weights: permutation and sharding written independently."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from convert import huggingface, source
from llama_jax.config import ModelConfig
from llama_jax.nn.transformer import param_shapes

GQA = ModelConfig(
    vocab_size=300,
    dim=64,
    ffn_dim=176,  # 2/3 of 4 * 64, rounded up to a multiple of 8
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=64,
)


MHA = dataclasses.replace(GQA, num_kv_heads=8)


TIED = dataclasses.replace(GQA, tie_embeddings=True)


PARAMS_JSON = {
    "dim": 64,
    "multiple_of": 8,
    "n_heads": 8,
    "n_kv_heads": 4,
    "n_layers": 2,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}


CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
}


Weights = dict[str, np.ndarray]


def random_weights(config: ModelConfig, dtype: npt.DTypeLike = np.float32) -> Weights:
    """Draw arrays that are exact in every dtype, so that casts lose nothing."""
    rng = np.random.default_rng(0)
    return {
        path: (rng.integers(-127, 128, leaf.shape) / 64).astype(dtype)
        for path, leaf in flat(param_shapes(config)).items()
    }


def flat(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def hf_name(path: str) -> str:
    renamed = {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "lm_head": "lm_head",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    *parents, leaf = path.split("/")
    leaf = renamed.get(leaf, leaf)
    if not parents:
        return f"{leaf}.weight"
    layer = f"model.layers.{parents[0].removeprefix('layer_')}."
    part = {"attention": "self_attn.", "feed_forward": "mlp."}[parents[1]] if parents[1:] else ""
    return f"{layer}{part}{leaf}{'_proj' if part else ''}.weight"


def meta_name(path: str) -> str:
    renamed = {"embed": "tok_embeddings", "final_norm": "norm", "lm_head": "output"}
    renamed |= {"gate": "w1", "down": "w2", "up": "w3"} | {c: f"w{c}" for c in "qkvo"}
    parts = [renamed.get(part, part) for part in path.split("/")]
    return ".".join(parts).replace("layer_", "layers.") + ".weight"


def write_hf(folder: pathlib.Path, weights: Weights, shards: int = 1, **config) -> pathlib.Path:
    """Write a source; a setting of None in `config` leaves the key out."""
    folder.mkdir()
    values = {k: v for k, v in (CONFIG_JSON | config).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(values))
    named = {path if "." in path else hf_name(path): array for path, array in weights.items()}
    if shards == 1:
        safetensors.numpy.save_file(named, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: named[name] for name in sorted(named)[i::shards]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_hf(folder: pathlib.Path) -> tuple[ModelConfig, Weights]:
    return read_all(huggingface.open_source(folder))


def read_all(opened: source.Source, dtype: str = "source") -> tuple[ModelConfig, Weights]:
    source.check_tensors(opened)
    tensors = source.read_params(opened, source.target_dtype(opened, dtype))
    return opened.config, {tensor.path: tensor.array for tensor in tensors}


def assert_same(got: Weights, expected: Weights):
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        assert got[path].dtype == array.dtype, path
        assert got[path].shape == array.shape, path
        assert got[path].tobytes() == array.tobytes(), path


BIN_INDEX = "pytorch_model.bin.index.json"


def as_torch(array: np.ndarray):
    """Return an array as a tensor of the same bits."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def write_bin(folder: pathlib.Path, weights: "Weights", shards: int = 1, **config) -> pathlib.Path:
    """Write a source as transformers did before it had safetensors."""
    import torch

    write_hf(folder, weights, shards, **config)
    index = folder / "model.safetensors.index.json"
    if shards > 1:
        text = index.read_text().replace('"model-', '"pytorch_model-')
        (folder / BIN_INDEX).write_text(text.replace(".safetensors", ".bin"))
        index.unlink()
    for file in folder.glob("*.safetensors"):
        arrays = safetensors.numpy.load_file(file)
        named = {name: as_torch(array) for name, array in arrays.items()}
        torch.save(named, folder / f"pytorch_{file.stem}.bin")
        file.unlink()
    return folder
