"""LoRA adapters in PEFT's format, made by hand."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from tests.helpers.sources import hf_name

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
SETTINGS = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "fan_in_fan_out": False,
    "bias": "none",
    "use_dora": False,
    "init_lora_weights": True,
    "qalora_group_size": 16,
}


def pair(module: str, rank: int, weights, dtype=np.float32, adapter="") -> dict[str, np.ndarray]:
    """Return random A and B for one module, by their names in PEFT's files."""
    outputs, inputs = next(
        w.shape for path, w in weights.items() if hf_name(path) == f"{module}.weight"
    )
    rng = np.random.default_rng(len(module))
    a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
    return {
        f"base_model.model.{module}.lora_A{adapter}.weight": a.astype(dtype),
        f"base_model.model.{module}.lora_B{adapter}.weight": b.astype(dtype),
    }


def write_adapter(folder: pathlib.Path, tensors, **settings) -> pathlib.Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder
