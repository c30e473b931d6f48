"""Refusals: why an engine takes no request, or no more."""

from llama_jax.errors import InputError


class ContextError(InputError):
    """The prompt and max_tokens do not fit the context together.

    Args:
        prompt_tokens: tokens of the prompt.
        max_tokens: None: none was given, and there is no room for 1.
        context: tokens that the context holds.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int | None, context: int):
        problem, remedy = f"prompt has {prompt_tokens:,} tokens", "shorten the prompt"
        if max_tokens is not None:
            problem += f" and max_tokens is {max_tokens:,}"
            remedy += " or lower max_tokens"
        super().__init__(f"{problem}, but the context holds {context:,}; {remedy}")
        self.prompt_tokens, self.context = prompt_tokens, context
        self.max_tokens = 1 if max_tokens is None else max_tokens


class QueueFullError(Exception):
    """The queue is full; try again later."""


class ClientShareError(QueueFullError):
    """The client's share of the queue is full."""


class EngineFailedError(RuntimeError):
    """The device fails every call; only a new process can help."""
