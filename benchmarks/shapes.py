"""Named model shapes to measure at."""

import pathlib
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.demo import DEMO_CHECKPOINT

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
_FILES = {
    "7b": _CONFIGS / "llama-2-7b.json",
    "13b": _CONFIGS / "llama-2-13b.json",
    "70b": _CONFIGS / "llama-2-70b.json",
    "demo": DEMO_CHECKPOINT / "config.json",
}
_SIZES: dict[str, dict[str, Any]] = {
    "1b": {"dim": 2048, "ffn_dim": 5632, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4},
    "300m": {"dim": 1024, "ffn_dim": 2816, "num_layers": 20, "num_heads": 16, "num_kv_heads": 16},
}
_COMMON: dict[str, Any] = {"vocab_size": 32000, "norm_eps": 1e-5, "rope_theta": 10000.0}
SHAPES = tuple(sorted([*_FILES, *_SIZES]))


def load_shape(name: str) -> ModelConfig:
    """Return the shape of that name, one of SHAPES."""
    if name in _FILES:
        return ModelConfig.load(_FILES[name])
    return ModelConfig(max_seq_len=4096, **_COMMON, **_SIZES[name])
