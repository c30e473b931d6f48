# pyright: reportMissingImports=false
# (gguf comes with the bench extra, which type checks do not need)
"""What peers' servers read: random weights in their own format, with a vocabulary."""

import dataclasses
import json
import pathlib

from benchmarks.checkpoints import make_source
from benchmarks.load import vocabulary
from llama_jax.config import ModelConfig
from llama_jax.text.tokenizer import BOS_ID, EOS_ID


def write_gguf(path: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write the file of `engines.llamacpp` anew, with a vocabulary: a server reads and writes text.

    Args:
        path: of the file.
        config: the shape.
        dtype: of the weights.
    """
    import gguf
    from gguf.scripts.gguf_new_metadata import copy_with_new_metadata

    from benchmarks.engines import llamacpp

    bare = path.with_suffix(".bare")
    llamacpp.write_gguf(bare, dataclasses.asdict(config), dtype)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    pieces = vocabulary.pieces(config.vocab_size)
    special = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([*special, *[gguf.TokenType.NORMAL] * (len(pieces) - len(special))])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    copy_with_new_metadata(gguf.GGUFReader(bare), writer, {}, [gguf.Keys.Tokenizer.MODEL])
    writer.close()
    bare.unlink()


def write_huggingface(path: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write a folder that transformers loads; no token ends an answer.

    Args:
        path: of the folder, which does not exist yet.
        config: the shape.
        dtype: of the weights.
    """
    make_source(path, config, dtype)
    vocabulary.write_huggingface(path, config.vocab_size)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((path / name).read_text("utf-8"))
        (path / name).write_text(json.dumps(settings | {"eos_token_id": None}), "utf-8")
