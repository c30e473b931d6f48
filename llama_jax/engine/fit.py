"""Fit: whether the context has room for a request."""

import dataclasses

from llama_jax.engine.parameters import DEFAULT_MAX_TOKENS
from llama_jax.engine.refusals import ContextError
from llama_jax.engine.request import GenerationRequest


def fit(request: GenerationRequest, prompt_tokens: int, context: int) -> GenerationRequest:
    """Return a request with its max_tokens; refuse one that the context has no room for."""
    given, room = request.parameters.max_tokens, context - prompt_tokens
    if (1 if given is None else given) > room:
        raise ContextError(prompt_tokens, given, context)
    limit = min(DEFAULT_MAX_TOKENS, room) if given is None else given
    parameters = dataclasses.replace(request.parameters, max_tokens=limit)
    return dataclasses.replace(request, parameters=parameters)
