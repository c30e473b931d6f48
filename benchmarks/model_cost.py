"""What a model must read and compute, from its shape: the least that any program could do."""

import dataclasses
from collections.abc import Mapping

from llama_jax.config import ModelConfig
from llama_jax.nn.sharding import Shards, splits_head

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number, by dtype."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The work of one measured case."""

    flops: float
    """Operations; a multiplication and an addition are two."""
    bytes: float
    """Those that move between memory and the cores."""

    def limit_seconds(self, bandwidth: float, matmul_rate: float) -> float:
        """Return the least seconds it can take."""
        return max(self.bytes / bandwidth, self.flops / matmul_rate)


ONE = Shards()
"""A model that is whole on one device. With other shards the costs are those of each device."""


def layer_params(config: ModelConfig, shards: Shards = ONE) -> int:
    """Return the parameters of all layers, norms included."""
    c, parts = config, shards.devices
    attention = 2 * c.dim * c.dim // parts + 2 * c.dim * c.num_kv_heads * c.head_dim // shards.kv
    return c.num_layers * (attention + 3 * c.dim * c.ffn_dim // parts + 2 * c.dim)


def layer_bytes(config: ModelConfig, dtype: str, shards: Shards = ONE) -> int:
    """Return the bytes of all layers, of a model of that dtype."""
    whole = layer_params(config, shards) * ITEM_BYTES[dtype]
    if not config.is_quantized:
        return whole
    c, parts = config, shards.devices
    norms = 2 * c.dim * c.num_layers
    outputs = (3 * c.dim + 2 * c.ffn_dim) // parts + 2 * c.num_kv_heads * c.head_dim // shards.kv
    # A byte of each number, and a float32 scale of each output.
    return (
        whole
        - (ITEM_BYTES[dtype] - 1) * (layer_params(config, shards) - norms)
        + (4 * c.num_layers * outputs)
    )


def params_read(config: ModelConfig, shards: Shards = ONE) -> int:
    """Return the parameters that one decoded token needs: all but the table of embeddings.

    Of that table a token needs one row, which is next to nothing; but a tied table is the output
    projection too, and as such is read in full.
    """
    head_parts = shards.devices if splits_head(config, shards) else 1
    return layer_params(config, shards) + config.dim + config.vocab_size * config.dim // head_parts


def bytes_read(config: ModelConfig, dtype: str, shards: Shards = ONE) -> int:
    """Return the bytes of `params_read`."""
    others = params_read(config, shards) - layer_params(config, shards)
    return layer_bytes(config, dtype, shards) + others * ITEM_BYTES[dtype]


def total_params(config: ModelConfig) -> int:
    """Return all parameters."""
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return params_read(config) + table


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes that the weights take in memory."""
    table = total_params(config) - params_read(config)
    return bytes_read(config, dtype) + table * ITEM_BYTES[dtype]


def kv_bytes(config: ModelConfig, dtype: str, shards: Shards = ONE) -> int:
    """Return the bytes of keys and values per token of one slot, over all layers."""
    heads = config.num_kv_heads // shards.kv
    return 2 * config.num_layers * heads * config.head_dim * ITEM_BYTES[dtype]


def decode_cost(
    config: ModelConfig,
    dtype: str,
    *,
    batch: int,
    context: float,
    new_tokens: int,
    shards: Shards = ONE,
) -> Cost:
    """Return the cost of `new_tokens` steps of `batch` slots that hold `context` tokens each.

    A step reads the weights once for all slots, and each slot's keys and values.
    """
    attended = context + (new_tokens + 1) / 2  # on average, the new token itself included
    # Scores, and their weighted sum.
    attention = 4 * config.num_layers * config.dim // shards.devices * attended
    params = params_read(config, shards)
    flops = batch * (2 * params + attention)
    read = bytes_read(config, dtype, shards) + batch * attended * kv_bytes(config, dtype, shards)
    return Cost(new_tokens * flops, new_tokens * read)


def chunk_cost(
    config: ModelConfig, dtype: str, *, tokens: int, before: int = 0, shards: Shards = ONE
) -> Cost:
    """Return the cost of reading tokens of a prompt, after `before` others, without their logits.

    Weights are read once; keys and values are written, and those of the tokens before are read.
    """
    width = config.dim // shards.devices
    attention = 4 * config.num_layers * width * tokens * (before + (tokens + 1) / 2)
    params = layer_params(config, shards)
    moved = layer_bytes(config, dtype, shards)
    moved += (before + tokens) * kv_bytes(config, dtype, shards)
    return Cost(2 * tokens * params + attention, moved)


def prefill_cost(config: ModelConfig, dtype: str, *, tokens: int) -> Cost:
    """Return the cost of reading a prompt; the output projection is needed at its end only."""
    chunk = chunk_cost(config, dtype, tokens=tokens)
    head = params_read(config) - layer_params(config)
    return Cost(chunk.flops + 2 * head, chunk.bytes + head * ITEM_BYTES[dtype])


def matmul_limit(matmul: Mapping[str, float], dtype: str) -> float:
    """Return the FLOP/s that a run in `dtype` may reach.

    At least float32's: numbers of 16 bits can be widened, so a CPU without products of float16 is
    held to those it has.
    """
    return max(matmul[dtype], matmul["float32"])
