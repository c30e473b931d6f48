"""Record: what a receipt says of a generation beside its answer."""

import dataclasses

from llama_jax.engine.draw import Draw
from llama_jax.engine.environment import Environment
from llama_jax.engine.request import GenerationRequest


@dataclasses.dataclass(frozen=True)
class Record:
    """A run: what was asked, where, and all that was drawn."""

    request: GenerationRequest
    environment: Environment
    draws: list[Draw]
    """Of the result's tokens, and of the stop token that ended them."""
    invocation: str
    """The run's own name."""
    started: float
    finished: float
    """Seconds of Unix time."""
