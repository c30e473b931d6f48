"""What each parameter is called, and how it is laid out, in the two published formats.

The only module that knows both. All three layouts store a weight as [outputs, inputs].
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Name:
    """One parameter's name in each format, and how Meta's layout of it differs."""

    ours: str
    huggingface: str
    meta: str
    shard_axis: int | None
    """The axis that Meta's model-parallel shards split; None: every shard holds the whole."""
    rotary: bool = False
    """Meta orders the outputs of a head as rotary pairs (x0, y0, x1, y1, ...); we and Hugging Face
    order them as halves (x0, x1, ..., y0, y1, ...)."""


_MODEL = (
    Name("embed", "model.embed_tokens", "tok_embeddings", 1),
    Name("final_norm", "model.norm", "norm", None),
    Name("lm_head", "lm_head", "output", 0),
)
_LAYER = (
    Name("attention_norm", "input_layernorm", "attention_norm", None),
    Name("attention/q", "self_attn.q_proj", "attention.wq", 0, rotary=True),
    Name("attention/k", "self_attn.k_proj", "attention.wk", 0, rotary=True),
    Name("attention/v", "self_attn.v_proj", "attention.wv", 0),
    Name("attention/o", "self_attn.o_proj", "attention.wo", 1),
    Name("ffn_norm", "post_attention_layernorm", "ffn_norm", None),
    Name("feed_forward/gate", "mlp.gate_proj", "feed_forward.w1", 0),
    Name("feed_forward/up", "mlp.up_proj", "feed_forward.w3", 0),
    Name("feed_forward/down", "mlp.down_proj", "feed_forward.w2", 1),
)


def names(num_layers: int) -> tuple[Name, ...]:
    """Return every parameter of a model, `lm_head` too (a model with tied embeddings has none)."""
    embed, *last = (_prefixed(row, "", "", "") for row in _MODEL)
    layers = [
        _prefixed(row, f"layer_{i}/", f"model.layers.{i}.", f"layers.{i}.")
        for i in range(num_layers)
        for row in _LAYER
    ]
    return (embed, *layers, *last)


def _prefixed(row: Name, ours: str, huggingface: str, meta: str) -> Name:
    return dataclasses.replace(
        row,
        ours=f"{ours}{row.ours}",
        huggingface=f"{huggingface}{row.huggingface}.weight",
        meta=f"{meta}{row.meta}.weight",
    )
