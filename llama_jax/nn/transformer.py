"""Llama 2 in Flax Linen, used functionally: (params, tokens, cache) -> (logits, cache).

The only module that imports flax. Weights are stored as published, [outputs, inputs], in the run's
dtype; the residual stream is float32. The layers are a Python loop over separate parameters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.config import ModelConfig
from llama_jax.jax_settings import pinned_settings
from llama_jax.nn import attention, ops, projection
from llama_jax.nn import cache as kv
from llama_jax.nn.kernel_choice import KernelChoice
from llama_jax.nn.quantized import Quantized
from llama_jax.nn.shapes import SCALE, param_dtype
from llama_jax.nn.sharding import ONE_DEVICE, Shards, splits_head

Params = dict[str, Any]
"""A nested dict of arrays: `embed`, `layer_{i}/attention/{q,k,v,o}`, `layer_{i}/attention_norm`,
`layer_{i}/feed_forward/{gate,up,down}`, `layer_{i}/ffn_norm`, `final_norm`, `lm_head`. A quantized
projection q is int8, and has its scales beside it, `q_scale`."""


_projection_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)


class _Layer(nn.Module):
    """Base of every module: the model's config, and how it is computed (see `plan.py`)."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    """The parameters'."""
    kernels: KernelChoice = KernelChoice()
    shards: Shards = ONE_DEVICE
    """Of several, each device has its part of every weight and calls this within `shard_map`."""

    def linears(
        self, x: Float[Array, "b T i"], *weights: Float[Array, "_ i"] | Quantized
    ) -> list[Array]:
        """Multiply the same activations by several weights."""
        multiply = projection.IMPLEMENTATIONS[self.kernels.projection]
        rows = self.kernels.decode_rows
        decoding = self.kernels.is_decoding(x.shape[1])
        if rows is None or not decoding or x.shape[0] <= rows:
            return multiply(x, *weights)
        parts: list[list[Array]] = []
        for part in jnp.split(x, x.shape[0] // rows):
            if parts:  # one after the other: XLA would make one product of them
                part, parts[-1] = lax.optimization_barrier((part, parts[-1]))
            parts.append(multiply(part, *weights))
        return [jnp.concatenate(each) for each in zip(*parts, strict=True)]

    def padded(self, x: Float[Array, "b T D"]) -> Float[Array, "padded T D"]:
        """Add sequences of zeros up to whole `decode_rows`."""
        rows = self.kernels.decode_rows
        if rows is None or not self.kernels.is_decoding(x.shape[1]):
            return x
        return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0), (0, 0)))

    def gathered(self, x: Float[Array, "padded T part"], batch: int) -> Float[Array, "padded T D"]:
        """Return the whole of what devices have parts of; they exchange the `batch` rows alone."""
        if self.shards.devices == 1:
            return x
        return self.padded(self.shards.gather(x[:batch]))

    def weight(
        self, name: str, outputs: int, inputs: int, *, parts: int | None = None
    ) -> Float[Array, "part inputs"] | Quantized:
        """Declare a projection, or one device's part of its outputs.

        Args:
            name, outputs, inputs: the whole projection's.
            parts: into how many it is split; None: into one for each device.
        """
        outputs //= self.shards.devices if parts is None else parts
        shape, dtype = (outputs, inputs), jnp.dtype(self.dtype)
        if param_dtype(name, self.config, dtype.name) != "int8":
            return self.param(name, _projection_init, shape, dtype)
        values = self.param(name, nn.initializers.zeros_init(), shape, jnp.int8)
        scale = self.param(name + SCALE, nn.initializers.ones_init(), shape[:1], jnp.float32)
        return Quantized(values, scale, dtype)

    def norm_weight(self, name: str) -> Float[Array, "D"]:
        """Declare a norm's weight."""
        return self.param(name, nn.initializers.ones_init(), (self.config.dim,), self.dtype)

    def normed(self, x: Float[Array, "b T D"], weight: Float[Array, "D"]) -> Float[Array, "b T D"]:
        """Normalise each position."""
        return ops.NORM_IMPLEMENTATIONS[self.kernels.norm](x, weight, self.config.norm_eps)


class Attention(_Layer):
    """Multi-head or grouped-query attention over the cache, with rotary positions."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "padded T D"],
        starts: Int[Array, "b"],
        rotation: ops.Rotation,
        cache: kv.LayerCache,
        *,
        slots: Int[Array, "b"] | None,
        attend_len: int,
    ) -> tuple[Float[Array, "padded T D"], kv.LayerCache]:
        """Attend from T new tokens to all so far; other arguments as in `Transformer`.

        Args:
            rotation: of the new tokens' positions.
        """
        c, kv_parts = self.config, self.shards.kv
        batch, length = starts.shape[0], x.shape[1]
        kv_dim = c.num_kv_heads * c.head_dim
        weights = (
            self.weight("q", c.dim, c.dim),
            self.weight("k", kv_dim, c.dim, parts=kv_parts),
            self.weight("v", kv_dim, c.dim, parts=kv_parts),
        )
        q, k, v = (
            a[:batch].reshape(batch, length, -1, c.head_dim) for a in self.linears(x, *weights)
        )
        q, k = ops.ROPE_IMPLEMENTATIONS[self.kernels.rope](*rotation, q, k)

        cache = kv.write(cache, k, v, starts, slots)
        name = self.kernels.attention if length == 1 else self.kernels.prefill_attention
        attend = attention.IMPLEMENTATIONS[name or self.kernels.attention]
        positions = _positions(starts, length)
        out = attend(q, cache.k, cache.v, positions, slots=slots, attend_len=attend_len)
        out = self.padded(self.shards.gather(out.reshape(batch, length, -1)))
        (out,) = self.linears(out, self.weight("o", c.dim, c.dim))
        return self.gathered(out, batch), cache


class FeedForward(_Layer):
    """SwiGLU feed-forward layer."""

    @nn.compact
    def __call__(self, x: Float[Array, "padded T D"], batch: int) -> Float[Array, "padded T D"]:
        """Transform each position by itself; the first `batch` sequences are not padding."""
        c = self.config
        gate, up = self.weight("gate", c.ffn_dim, c.dim), self.weight("up", c.ffn_dim, c.dim)
        down = self.weight("down", c.dim, c.ffn_dim)
        to_float16 = projection.rounds_to_float16(self.kernels.projection, down)
        gather = functools.partial(self.gathered, batch=batch)
        out = ops.swiglu(x, gate, up, down, self.linears, gather, to_float16=to_float16)
        return gather(out)


class Block(_Layer):
    """One decoder layer: normalised attention, then normalised feed-forward, each added to x."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "padded T D"],
        starts: Int[Array, "b"],
        rotation: ops.Rotation,
        cache: kv.LayerCache,
        *,
        slots: Int[Array, "b"] | None,
        attend_len: int,
    ) -> tuple[Float[Array, "padded T D"], kv.LayerCache]:
        """Run one layer; arguments as in `Transformer`, but that rows may be added to x."""
        how = (self.config, self.dtype, self.kernels, self.shards)
        attention = Attention(*how, name="attention")
        feed_forward = FeedForward(*how, name="feed_forward")
        normed = self.normed(x, self.norm_weight("attention_norm"))
        attended, cache = attention(
            normed, starts, rotation, cache, slots=slots, attend_len=attend_len
        )
        x = x + attended
        normed = self.normed(x, self.norm_weight("ffn_norm"))
        return x + feed_forward(normed, starts.shape[0]), cache


class Transformer(_Layer):
    """A decoder-only transformer: token ids in, float32 logits and the updated cache out."""

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        embed_init = nn.initializers.normal(1.0)
        width = c.dim if c.tie_embeddings else c.dim // self.shards.devices
        self.embed = self.param("embed", embed_init, (c.vocab_size, width), self.dtype)
        how = (c, self.dtype, self.kernels, self.shards)
        self.layer = [Block(*how) for _ in range(c.num_layers)]
        self.final_norm = self.norm_weight("final_norm")
        if not c.tie_embeddings:
            parts = self.shards.devices if splits_head(c, self.shards) else 1
            self.lm_head = self.weight("lm_head", c.vocab_size, c.dim, parts=parts)

    def __call__(
        self,
        tokens: Int[Array, "b T"],
        starts: Int[Array, "b"],
        cache: kv.KVCache,
        *,
        slots: Int[Array, "b"] | None = None,
        attend_len: int,
    ) -> tuple[Float[Array, "b T V"], kv.KVCache]:
        """Run T tokens of each sequence; store their keys and values; return the logits.

        Args:
            tokens: ids in [0, vocab_size). Padding goes to the right, holds any valid id, and is
                overwritten by the tokens that come later; nothing attends to it before.
            starts: absolute position of `tokens[:, 0]`, for each sequence.
            cache: as from `init_cache`; donate it to have it written in place.
            slots: the cache slot of each sequence in `tokens`; None: all, in order. More than one,
                but not all, only with the CPU kernels' attention.
            attend_len: static; cache positions that attention reads, at least starts + T.

        Returns:
            Logits over the vocabulary, and the cache.
        """
        x, cache = self.hidden(tokens, starts, cache, slots=slots, attend_len=attend_len)
        return self.logits(x)[: tokens.shape[0]], cache

    def hidden(
        self,
        tokens: Int[Array, "b T"],
        starts: Int[Array, "b"],
        cache: kv.KVCache,
        *,
        slots: Int[Array, "b"] | None = None,
        attend_len: int,
    ) -> tuple[Float[Array, "padded T D"], kv.KVCache]:
        """Return the residual stream after the last layer, and the cache; see `__call__`.

        Rows may be added to those of `tokens`; see `KernelChoice.decode_rows`.
        """
        c = self.config
        positions = _positions(starts, tokens.shape[1])
        rotation = ops.make_rotation(
            ops.rope_angles(positions, c.head_dim, c.rope_theta, c.rope_factor)
        )
        x = ops.embed(tokens, self.embed)
        x = self.padded(x if c.tie_embeddings else self.shards.gather(x))
        layers = []
        for block, layer_cache in zip(self.layer, cache, strict=True):
            x, layer_cache = block(
                x, starts, rotation, layer_cache, slots=slots, attend_len=attend_len
            )
            layers.append(layer_cache)
        return x, tuple(layers)

    def logits(self, x: Float[Array, "b T D"]) -> Float[Array, "b T V"]:
        """Return the logits over the vocabulary at each position of the residual stream."""
        normed = self.normed(self.padded(x), self.final_norm)
        head = self.embed if self.config.tie_embeddings else self.lm_head
        (logits,) = self.linears(normed, head)
        logits = logits[: x.shape[0]]
        return self.shards.gather(logits) if splits_head(self.config, self.shards) else logits


def _positions(starts: Int[Array, "b"], length: int) -> Int[Array, "b T"]:
    """Return the absolute positions of `length` tokens of each sequence."""
    return starts[:, None] + jnp.arange(length, dtype=starts.dtype)[None, :]


def forward(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "b T"],
    starts: Int[Array, "b"],
    cache: kv.KVCache,
    *,
    slots: Int[Array, "b"] | None = None,
    attend_len: int,
) -> tuple[Float[Array, "b T V"], kv.KVCache]:
    """Apply the model as a pure function of its parameters; see `Transformer.__call__`."""
    outputs: Any = model.apply(
        {"params": params}, tokens, starts, cache, slots=slots, attend_len=attend_len
    )
    return outputs


def init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Draw random parameters: for training, tests and speed measurements at a real shape.

    Quantized ones are zeros: they are made of others, by `python -m convert quantize`.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    cache = kv.init_cache(config, batch=1, capacity=1, dtype=dtype)
    variables: Any = Transformer(config, dtype).init(key, tokens, tokens[0], cache, attend_len=1)
    return variables["params"]


@pinned_settings()
def param_shapes(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the parameters' shapes and dtype as a tree of ShapeDtypeStruct; allocates nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
