"""Hugging Face transformers in PyTorch: a plain loop of forward passes, at its best.

No `generate`, whose work between steps is not the model's. With `compile` the pass of one token
runs through torch.compile on a static cache.
"""

import time
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.engines import protocol


def llama_settings(config: dict) -> dict[str, Any]:
    """Return the arguments of a LlamaConfig for fields of a ModelConfig."""
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "intermediate_size": config["ffn_dim"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "rms_norm_eps": config["norm_eps"],
        "max_position_embeddings": config["max_seq_len"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


def make_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> Any:
    """Return a model with random weights, without ever holding them twice."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.dim() == 1:
            weight.fill_(1)
        else:
            scale = (3 / weight.shape[1]) ** 0.5
            weight.uniform_(-scale, scale)
    return model


class HuggingFace:
    """The engine; see `protocol.serve`."""

    def load(
        self,
        config: dict,
        dtype: str,
        contexts: dict[str, int],
        threads: int,
        on_gpu: bool,
        compiled: bool,
        **_: Any,
    ) -> dict[str, Any]:
        """Make random weights; `compiled`: run one-token passes through torch.compile."""
        if on_gpu and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA; install one that has")
        torch.set_num_threads(threads)
        self.contexts = {int(batch): context for batch, context in contexts.items()}
        self.device = "cuda" if on_gpu else "cpu"
        self.dtype = getattr(torch, dtype)
        self.config = LlamaConfig(**llama_settings(config))
        self.kv_heads, self.head_dim = config["num_kv_heads"], config["dim"] // config["num_heads"]
        began = time.perf_counter()
        self.model = make_model(self.config, self.dtype, self.device)
        self._wait()
        seconds = time.perf_counter() - began
        # The forward passes in between are the same object: only `decode` uses the compiled one.
        self.step = (
            torch.compile(self.model.forward, mode="reduce-overhead") if compiled else self.model
        )
        self.compiled, self.batch = compiled, 0
        self.cache: Any = None
        return {
            "load_s": seconds,
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        }

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt to its first token, on the host."""
        prompt = protocol.prompt(tokens, self.config.vocab_size)
        self._wait()
        began = time.perf_counter()
        ids = torch.tensor([prompt], device=self.device)
        outputs = self.model(
            ids, past_key_values=DynamicCache(config=self.config), logits_to_keep=1
        )
        outputs.logits[0, -1].argmax().item()
        return time.perf_counter() - began

    @torch.inference_mode()
    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Return the seconds of `new_tokens` further tokens per slot, all read by the host."""
        cache = self._set_cache(batch, context)
        ids = torch.full((batch, 1), 3, device=self.device)
        self._wait()
        began = time.perf_counter()
        for position in range(context, context + new_tokens):
            positions = torch.full((batch, 1), position, device=self.device)
            logits = self.step(ids, past_key_values=cache, position_ids=positions).logits
            # A copy: the next compiled pass writes over this one's outputs.
            ids = logits[:, -1].argmax(-1, keepdim=True).clone()
            ids.tolist()
        return time.perf_counter() - began

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of this process, and of the GPU if it runs there."""
        peaks = {"process_bytes": protocol.peak_rss()}
        if self.device == "cuda":
            peaks["device_bytes"] = torch.cuda.max_memory_allocated()
        return peaks

    def _set_cache(self, batch: int, context: int) -> Any:
        """Return a cache that holds `context` tokens per slot, of no particular value."""
        if not self.compiled:
            shape = (batch, self.kv_heads, context, self.head_dim)
            cache = DynamicCache(config=self.config)
            for layer in range(self.config.num_hidden_layers):
                keys, values = torch.zeros((2, *shape), dtype=self.dtype, device=self.device)
                cache.update(keys, values, layer)
            return cache
        if self.batch != batch:  # the compiled pass is of one cache's memory
            self.batch, self.cache = batch, None  # free the old one before the new is made
            self.cache = StaticCache(self.config, max_cache_len=self.contexts[batch])
            self.cache.early_initialization(
                batch, self.kv_heads, self.head_dim, self.dtype, torch.device(self.device)
            )
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(context)
        return self.cache

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    protocol.serve(HuggingFace())
