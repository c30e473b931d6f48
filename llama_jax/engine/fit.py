"""Fit: whether the context has room for a request."""

import dataclasses

from llama_jax.engine.parameters import DEFAULT_MAX_TOKENS
from llama_jax.engine.request import GenerationRequest
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


def fit(request: GenerationRequest, prompt_tokens: int, context: int) -> GenerationRequest:
    """Return a request with its max_tokens; refuse one that the context has no room for."""
    given, room = request.parameters.max_tokens, context - prompt_tokens
    if (1 if given is None else given) > room:
        raise ContextError(prompt_tokens, given, context)
    limit = min(DEFAULT_MAX_TOKENS, room) if given is None else given
    parameters = dataclasses.replace(request.parameters, max_tokens=limit)
    return dataclasses.replace(request, parameters=parameters)
