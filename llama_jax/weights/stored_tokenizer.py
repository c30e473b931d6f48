"""The tokenizer of a stored checkpoint: read without its weights, or added to it."""

import pathlib

from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.checkpoint import open_checkpoint, tokenizer_path
from llama_jax.weights.manifest import add_file
from llama_jax.weights.unconverted import checkpoint_folder

_NAME = "tokenizer.model"


def load_tokenizer(path: str | pathlib.Path) -> tuple[Tokenizer | None, int]:
    """Return a checkpoint's tokenizer, if it has one, and the model's vocabulary size.

    Raises:
        InputError: see `load_checkpoint`; the weights are not read.
    """
    path = checkpoint_folder(path)
    values, config = open_checkpoint(path)
    file = tokenizer_path(path, values)
    return file and Tokenizer(file), config.vocab_size


def add_tokenizer(path: str | pathlib.Path, model: bytes) -> None:
    """Give a checkpoint that has no tokenizer one.

    Args:
        path: the checkpoint.
        model: the content of its tokenizer.model, checked.

    Raises:
        InputError: see `load_checkpoint`; it has a tokenizer.
    """
    path = checkpoint_folder(path)
    values, _ = open_checkpoint(path)
    if tokenizer_path(path, values) is not None:
        raise InputError(f"checkpoint {path} has a tokenizer already; convert the weights again")
    add_file(path, values, _NAME, model)
