"""llama.cpp through llama-cpp-python, on a GGUF file of random weights; a batch of 1."""

import importlib.metadata
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import gguf  # pyright: ignore[reportMissingImports] (in the bench extra alone)
import llama_cpp  # pyright: ignore[reportMissingImports] (as gguf)
import numpy as np

from benchmarks.engines import protocol

FILE_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}


def write_gguf(path: pathlib.Path, config: dict, dtype: str) -> None:
    """Write a Llama of random weights and the vocabulary of `protocol.pieces`.

    Norms are float32, as llama.cpp's own converter makes them. A quantized model is Q8_0: all its
    matrices are int8 with a scale of 32 numbers, the embeddings and the output layer too. All
    matrices are views of one array, so that this takes the memory of one of them.
    """
    file_type = FILE_TYPES[dtype]
    if config.get("quantization") == "int8":
        file_type = gguf.GGMLQuantizationType.Q8_0
    dim, heads, vocab_size = config["dim"], config["num_heads"], config["vocab_size"]
    kv_dim = dim // heads * config["num_kv_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(dim)
    writer.add_block_count(config["num_layers"])
    writer.add_feed_forward_length(config["ffn_dim"])
    writer.add_rope_dimension_count(dim // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_kv_heads"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    _add_vocabulary(writer, vocab_size)

    shapes = {"token_embd": (vocab_size, dim)}
    if not config["tie_embeddings"]:
        shapes["output"] = shapes["token_embd"]
    for layer in range(config["num_layers"]):
        shapes |= {
            f"blk.{layer}.attn_q": (dim, dim),
            f"blk.{layer}.attn_k": (kv_dim, dim),
            f"blk.{layer}.attn_v": (kv_dim, dim),
            f"blk.{layer}.attn_output": (dim, dim),
            f"blk.{layer}.ffn_gate": (config["ffn_dim"], dim),
            f"blk.{layer}.ffn_up": (config["ffn_dim"], dim),
            f"blk.{layer}.ffn_down": (dim, config["ffn_dim"]),
        }
    most = max(rows * columns for rows, columns in shapes.values())
    numbers = 0.06 * np.random.default_rng(0).random(most, np.float32) - np.float32(0.03)
    data = gguf.quantize(numbers, file_type).view(np.uint8)  # NumPy has no bfloat16
    for name, (rows, columns) in shapes.items():
        row_bytes = columns * data.size // most
        matrix = data[: rows * row_bytes].reshape(rows, row_bytes)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=file_type)
    norms = [f"blk.{i}.{n}_norm" for i in range(config["num_layers"]) for n in ("attn", "ffn")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(protocol.pieces(vocab_size))
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (vocab_size - 3)])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


class LlamaCpp:
    """The engine; see `protocol.serve`."""

    def load(
        self,
        config: dict,
        dtype: str,
        contexts: dict[str, int],
        threads: int,
        on_gpu: bool,
        **_: Any,
    ) -> dict[str, Any]:
        """Write the file and map it; the file is gone again when this process ends."""
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise RuntimeError("this llama-cpp-python has no GPU backend; install one that has")
        self.vocab_size = config["vocab_size"]
        with tempfile.TemporaryDirectory(prefix="benchmarks_") as folder:
            path = pathlib.Path(folder) / "model.gguf"
            write_gguf(path, config, dtype)
            began = time.perf_counter()
            self.model = llama_cpp.Llama(
                str(path),
                n_gpu_layers=-1 if on_gpu else 0,
                n_ctx=contexts["1"],
                n_threads=threads,
                n_threads_batch=threads,
                flash_attn=True,  # which llama.cpp chooses by itself, this binding does not
                verbose=False,
            )
            seconds = time.perf_counter() - began
        version = importlib.metadata.version("llama-cpp-python")
        return {"load_s": seconds, "version": f"llama-cpp-python {version}"}

    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt to its first token, on the host."""
        prompt = protocol.prompt(tokens, self.vocab_size)
        self.model.n_tokens = 0
        began = time.perf_counter()
        self._next(prompt)
        return time.perf_counter() - began

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Return the seconds of `new_tokens` further tokens; a longer context is read before."""
        self.model.n_tokens = min(self.model.n_tokens, context)
        token = self._next(protocol.prompt(context - self.model.n_tokens, self.vocab_size))
        began = time.perf_counter()
        for _ in range(new_tokens):
            token = self._next([token])
        return time.perf_counter() - began

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of this process; pages of the mapped file count."""
        return {"process_bytes": protocol.peak_rss()}

    def _next(self, tokens: Sequence[int]) -> int:
        """Read tokens, behind those in the cache; return the likeliest next one."""
        self.model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


if __name__ == "__main__":
    protocol.serve(LlamaCpp())
