"""Shapes and dtypes of all parameters, by arithmetic: a config from outside is checked before it is
traced."""

from llama_jax.config import ModelConfig

SCALE = "_scale"
"""Ends the name of a quantized projection's scales, which is else the projection's."""

_OUTSIDE_LAYERS = 3  # embed, final_norm, lm_head
_NORMS = 2
_PROJECTIONS = {"q", "k", "v", "o", "gate", "up", "down"}


def num_arrays(config: ModelConfig) -> int:
    """Return the number of parameter arrays."""
    per_layer = _NORMS + len(_PROJECTIONS) * (1 + config.is_quantized)
    return config.num_layers * per_layer + _OUTSIDE_LAYERS - config.tie_embeddings


def shapes_by_path(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of `param_shapes`, by its path."""
    c = config
    keys = c.num_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (c.dim,),
        "attention/q": (c.dim, c.dim),
        "attention/k": (keys, c.dim),
        "attention/v": (keys, c.dim),
        "attention/o": (c.dim, c.dim),
        "ffn_norm": (c.dim,),
        "feed_forward/gate": (c.ffn_dim, c.dim),
        "feed_forward/up": (c.ffn_dim, c.dim),
        "feed_forward/down": (c.dim, c.ffn_dim),
    }
    if c.is_quantized:
        layer |= {name + SCALE: shape[:1] for name, shape in layer.items() if len(shape) == 2}
    shapes: dict[str, tuple[int, ...]] = {
        f"layer_{i}/{name}": shape for i in range(c.num_layers) for name, shape in layer.items()
    }
    shapes |= {"embed": (c.vocab_size, c.dim), "final_norm": (c.dim,)}
    return shapes if c.tie_embeddings else shapes | {"lm_head": (c.vocab_size, c.dim)}


def fixed_dtype(path: str, config: ModelConfig) -> str | None:
    """Return the dtype that a parameter has in every run; None: it has the run's."""
    if not config.is_quantized:
        return None
    if path.endswith(SCALE):
        return "float32"
    return "int8" if path.rpartition("/")[2] in _PROJECTIONS else None


def param_dtype(path: str, config: ModelConfig, dtype: str) -> str:
    """Return the dtype of a parameter in a run of that dtype."""
    return fixed_dtype(path, config) or dtype
