"""Admission: what the device is given of a generation that gets a slot."""

from llama_jax.decode import sampling
from llama_jax.decode.needs import Needs, needs_of
from llama_jax.decode.state import Admission, make_admission
from llama_jax.engine.generation import Generation
from llama_jax.engine.parameters import sampling_params


def admission_of(generation: Generation, start: int, vocab_size: int) -> tuple[Admission, Needs]:
    """Return what a slot gets of a generation, and what its sampling steps need.

    Args:
        generation: its first tokens may have been drawn elsewhere.
        start: tokens of its prefix that the slot's cache holds.
        vocab_size: the model's.
    """
    parameters = generation.request.parameters
    params = sampling_params(parameters)
    new = make_admission(
        params,
        generation.prompt,
        vocab_size,
        limit=max(1, generation.max_tokens),
        stop_tokens=generation.stop_tokens,
        bias=sampling.make_bias(vocab_size, parameters.logit_bias, parameters.allowed_tokens),
        output=generation.tokens,
        start=start,
    )
    return new, needs_of(params, logprobs=parameters.logprobs is not None)
