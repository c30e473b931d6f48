"""llama.cpp through its C interface, on a GGUF file of random weights; a batch of 1."""

import ctypes
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


def write_gguf(path: pathlib.Path, config: dict, dtype: str, pieces: Sequence[str] = ()) -> None:
    """Write a Llama of random weights, and of a vocabulary if there are `pieces`.

    Norms are float32, as llama.cpp's own converter makes them. All matrices are views of one
    array, so that this takes the memory of one of them.
    """
    dim, heads = config["dim"], config["num_heads"]
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
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, pieces)

    shapes = {"token_embd": (config["vocab_size"], dim)}
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
    numbers = _random_bits(max(rows * columns for rows, columns in shapes.values()), dtype)
    for name, (rows, columns) in shapes.items():
        matrix = numbers[: rows * columns].reshape(rows, columns)
        if dtype == "bfloat16":  # which NumPy does not have: given as bytes
            matrix = matrix.view(np.uint8)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=FILE_TYPES[dtype])
    norms = [f"blk.{i}.{n}_norm" for i in range(config["num_layers"]) for n in ("attn", "ffn")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, pieces: Sequence[str]) -> None:
    """Add the text of each id, of which the first three are special; none: only their number."""
    writer.add_tokenizer_model("llama" if pieces else "none")
    if pieces:
        kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * len(pieces))
        writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (len(pieces) - 3)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)


def _random_bits(count: int, dtype: str) -> np.ndarray:
    """Return uniform numbers of a dtype; bfloat16 ones as their 16 bits."""
    numbers = np.random.default_rng(0).random(count, np.float32)
    numbers -= np.float32(0.5)
    numbers *= np.float32(0.06)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(dtype)


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
            settings = llama_cpp.llama_model_default_params()
            settings.n_gpu_layers = -1 if on_gpu else 0
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
            if not self.model:
                raise RuntimeError("llama.cpp did not load the file; see the log")
            seconds = time.perf_counter() - began
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = contexts["1"]
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp made no context; see the log")
        self.batch_size = llama_cpp.llama_n_batch(self.context)
        self.filled = 0
        version = importlib.metadata.version("llama-cpp-python")
        return {"load_s": seconds, "version": f"llama-cpp-python {version}"}

    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt to its first token, on the host."""
        prompt = protocol.prompt(tokens, self.vocab_size)
        self._cut(0)
        began = time.perf_counter()
        self._eval(prompt)
        self._argmax()
        return time.perf_counter() - began

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Return the seconds of `new_tokens` further tokens; a longer context is read before."""
        self._cut(context)
        if self.filled < context:
            self._eval(protocol.prompt(context - self.filled, self.vocab_size))
        token = 3
        began = time.perf_counter()
        for _ in range(new_tokens):
            self._eval([token])
            token = self._argmax()
        return time.perf_counter() - began

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of this process; pages of the mapped file count."""
        return {"process_bytes": protocol.peak_rss()}

    def _cut(self, length: int) -> None:
        """Forget what the cache holds from `length` on."""
        cache = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_seq_rm(cache, -1, length, -1)
        self.filled = min(self.filled, length)

    def _eval(self, tokens: Sequence[int]) -> None:
        """Read tokens, behind those in the cache; keep the logits of the last."""
        for begin in range(0, len(tokens), self.batch_size):
            part = tokens[begin : begin + self.batch_size]
            array = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(
                self.context, llama_cpp.llama_batch_get_one(array, len(part))
            )
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self.context)
        self.filled += len(tokens)

    def _argmax(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents
        return int(np.frombuffer(row, np.float32).argmax())


if __name__ == "__main__":
    protocol.serve(LlamaCpp())
