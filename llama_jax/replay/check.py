"""Check: what the law draws here after each beginning of a recorded answer, in one pass over it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.decode.needs import needs_of
from llama_jax.decode.sampling import make_bias
from llama_jax.decode.texts import Law
from llama_jax.engine.draw import Draw
from llama_jax.engine.parameters import Parameters, sampling_params
from llama_jax.llama import Llama


class Checked(NamedTuple):
    """One recorded draw, drawn again after the same beginning."""

    draw: Draw
    """The token that the law draws here; `logprob` is that of the recorded token."""
    deficit: float
    """The best score less that of the recorded token: 0 if it is the one drawn, infinite if a
    filter cuts it."""


def check_draws(
    llm: Llama, prompt: Sequence[int], draws: Sequence[Draw], parameters: Parameters
) -> list[Checked]:
    """Draw again each of some draws, after the prompt and the recorded tokens before it.

    Args:
        llm: the model.
        prompt: its token ids.
        draws: all of them, in order; the prompt and they fit the context.
        parameters: by which they were drawn.
    """
    if not draws:
        return []
    vocab_size = llm.config.vocab_size
    params = sampling_params(parameters)
    in_prompt = np.zeros(vocab_size, bool)
    in_prompt[list(prompt)] = True
    bias = make_bias(vocab_size, parameters.logit_bias, parameters.allowed_tokens)
    law, needs = Law(params, bias, in_prompt), needs_of(params, logprobs=False)
    text = [*prompt, *(draw.token for draw in draws)]
    rows = llm.engine.between_turns(
        lambda executor: executor.check_draws(text, len(prompt), law, needs)
    )
    drawn = zip(rows.tokens.tolist(), rows.measures.tolist(), strict=True)
    return [
        Checked(Draw(token, *measures), deficit)
        for (token, measures), deficit in zip(drawn, rows.deficits.tolist(), strict=True)
    ]
