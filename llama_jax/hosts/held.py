"""Held: the values on the devices that programs hand to each other, by kind."""

from typing import Any

from llama_jax.decode.state import DecodeState
from llama_jax.decode.steps import ReadChunk
from llama_jax.nn.cache import LayerCache


def kind_of(value: Any) -> str | None:
    """Return the kind of a value that stays on the devices; None: it is the host's, or a result.

    At any time there is one of a kind: a program consumes the state or cache that it is given, and
    a chunk is used before the next one is read.
    """
    match value:
        case dict():
            return "params"
        case DecodeState():
            return "state"
        case ReadChunk():
            return "chunk"
        case (LayerCache(), *_):
            return "cache"
    return None
