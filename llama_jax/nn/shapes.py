"""Shapes of all parameters, by arithmetic: a config from outside is checked before it is traced."""

from llama_jax.config import ModelConfig

_OUTSIDE_LAYERS = 3  # embed, final_norm, lm_head
_PER_LAYER = 9


def num_arrays(config: ModelConfig) -> int:
    """Return the number of parameter arrays."""
    return config.num_layers * _PER_LAYER + _OUTSIDE_LAYERS - config.tie_embeddings


def shapes_by_path(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of `param_shapes`, by its path."""
    c = config
    keys = c.num_kv_heads * c.head_dim
    layer = {
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
    shapes: dict[str, tuple[int, ...]] = {
        f"layer_{i}/{name}": shape for i in range(c.num_layers) for name, shape in layer.items()
    }
    shapes |= {"embed": (c.vocab_size, c.dim), "final_norm": (c.dim,)}
    return shapes if c.tie_embeddings else shapes | {"lm_head": (c.vocab_size, c.dim)}
