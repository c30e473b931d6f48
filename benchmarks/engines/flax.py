"""Hugging Face's own Llama in Flax (transformers 4.49), under one jit per case.

The last release line with that model does not go together with today's transformers, so this runs
under an interpreter of its own (`--flax_python`), and imports nothing of this project but the
protocol.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from transformers import FlaxLlamaForCausalLM, LlamaConfig  # pyright: ignore (gone from transformers 5)

from benchmarks.engines import protocol


class FlaxLlama:
    """The engine; see `protocol.serve`."""

    def load(self, config: dict, dtype: str, contexts: dict[str, int], **_: Any) -> dict[str, Any]:
        """Make random weights."""
        self.contexts = {int(batch): context for batch, context in contexts.items()}
        self.model: Any = FlaxLlamaForCausalLM(
            LlamaConfig(
                vocab_size=config["vocab_size"],
                hidden_size=config["dim"],
                intermediate_size=config["ffn_dim"],
                num_hidden_layers=config["num_layers"],
                num_attention_heads=config["num_heads"],
                num_key_value_heads=config["num_kv_heads"],
                rms_norm_eps=config["norm_eps"],
                max_position_embeddings=config["max_seq_len"],
                tie_word_embeddings=config["tie_embeddings"],
            ),
            dtype=jnp.dtype(dtype),
            _do_init=False,
        )
        self.vocab_size = config["vocab_size"]
        began = time.perf_counter()
        self.params = jax.tree.map(
            lambda leaf: _filled(leaf.shape, jnp.dtype(dtype)), self.model.params_shape_tree
        )
        jax.block_until_ready(self.params)
        seconds = time.perf_counter() - began
        self.batch, self.cache = 0, None
        return {
            "load_s": seconds,
            "version": f"transformers {transformers.__version__}, jax {jax.__version__}",
        }

    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt to its first token, on the host."""
        prompt = np.array([protocol.prompt(tokens, self.vocab_size)], np.int32)
        cache = self._cache(1)
        began = time.perf_counter()
        token, self.cache = self._prefill(self.params, cache, prompt)
        np.asarray(token)
        return time.perf_counter() - began

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Return the seconds of `new_tokens` further tokens per row, drawn in one scan."""
        cache = _at(self._cache(batch), context)
        jax.block_until_ready(cache)
        began = time.perf_counter()
        tokens, self.cache = self._decode(self.params, cache, np.int32(context), new_tokens)
        np.asarray(tokens)
        return time.perf_counter() - began

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of this process, and of the device if it has its own."""
        stats = jax.devices()[0].memory_stats() or {}
        peaks = {"process_bytes": protocol.peak_rss()}
        if "peak_bytes_in_use" in stats:
            peaks["device_bytes"] = stats["peak_bytes_in_use"]
        return peaks

    def _cache(self, batch: int) -> Any:
        """Return the cache to hand over to a program, which consumes it."""
        cache, self.cache = (self.cache if batch == self.batch else None), None
        self.batch = batch
        if cache is None:
            cache = self.model.init_cache(batch, self.contexts[batch])
        return cache

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _prefill(self, params: Any, cache: Any, prompt: jax.Array) -> tuple[jax.Array, Any]:
        """Read a prompt [1, T] into the start of the cache; return the next token too."""
        length = prompt.shape[1]
        outputs = self._forward(params, _at(cache, 0), prompt, jnp.arange(length)[None])
        return outputs.logits[:, -1].argmax(-1), outputs.past_key_values

    @functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
    def _decode(
        self, params: Any, cache: Any, start: jax.Array, new_tokens: int
    ) -> tuple[jax.Array, Any]:
        """Draw greedily from position `start` on."""
        batch = self.batch

        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            tokens, position, cache = carry
            positions = jnp.full((batch, 1), position)
            outputs = self._forward(params, cache, tokens[:, None], positions)
            tokens = outputs.logits[:, -1].argmax(-1).astype(jnp.int32)
            return (tokens, position + 1, outputs.past_key_values), tokens

        carry = (jnp.full((batch,), 3, jnp.int32), start, cache)
        (_, _, cache), tokens = jax.lax.scan(step, carry, None, length=new_tokens)
        return tokens, cache

    def _forward(self, params: Any, cache: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        mask = jnp.ones((tokens.shape[0], self.contexts[tokens.shape[0]]), jnp.int32)
        return self.model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            params=params,
            past_key_values=cache,
            return_dict=True,
        )


def _at(cache: Any, position: jax.Array | int) -> Any:
    """Return the cache set to go on at a position."""

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return jnp.full(leaf.shape, position, leaf.dtype) if "cache_index" in name else leaf

    return jax.tree_util.tree_map_with_path(place, cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _filled(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return numbers that differ from row to row and column to column; ones for a norm."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.float32, shape, axis) for axis in (0, 1))
    return (jnp.sin(row * 12.9898 + column * 78.233) * shape[0] ** -0.5).astype(dtype)


if __name__ == "__main__":
    protocol.serve(FlaxLlama())
