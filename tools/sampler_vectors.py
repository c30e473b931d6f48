"""Print the test vectors of docs/sampler.md: `python -m tools.sampler_vectors`."""

import json

import jax.numpy as jnp
import numpy as np

from llama_jax.decode import sampling

LOGITS = [2.0, 1.5, 1.5, 0.0, -0.5, 1.0, 0.3, -2.0, 0.3, 0.3, -1.0, 0.8]
IN_PROMPT = [0, 3, 4]
OUTPUT = [1, 1, 1, 5, 4]
CASES = [
    (7, {"temperature": 0.0}),
    (7, {"temperature": 1.0}),
    (2**32 + 7, {"temperature": 1.0}),
    (0, {"temperature": 0.6}),
    (9_999_999_999, {"temperature": 5.0}),
    (7, {"temperature": 1.0, "top_k": 3}),
    (7, {"temperature": 1.0, "top_p": 0.5}),
    (7, {"temperature": 2.0, "top_k": 6, "top_p": 0.8}),
    (7, {"temperature": 1.0, "min_p": 0.3}),
    (7, {"temperature": 2.0, "top_p": 0.9, "min_p": 0.4}),
    (7, {"temperature": 1.0, "logit_bias": {"0": -100, "7": 3.5}}),
    (7, {"temperature": 0.0, "logit_bias": {"0": -0.75, "5": 0.5}}),
    (7, {"temperature": 1.0, "allowed_tokens": [3, 4, 6, 9]}),
    (7, {"temperature": 1.0, "repetition_penalty": 1.3}),
    (7, {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 0.5}),
    (
        2**64 - 1,
        {
            "temperature": 0.8,
            "top_k": 9,
            "top_p": 0.95,
            "min_p": 0.05,
            "logit_bias": {"7": 2.5, "9": -1.0},
            "allowed_tokens": [0, 2, 4, 5, 6, 7, 8, 9, 10],
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.2,
            "presence_penalty": 0.1,
        },
    ),
]


def noise(seed: int, step: int) -> list[float]:
    """Return the noise of tokens 0 to 3."""
    values = sampling.gumbel(sampling.seed_words(seed), jnp.int32(step), 4)
    return [float(f"{value:.7g}") for value in np.asarray(values)]


def tokens(seed: int, parameters: dict) -> list[int]:
    """Return 16 draws from the logits above, steps 0 to 15, the counts held fixed."""
    size = len(LOGITS)
    logits = jnp.asarray([LOGITS], jnp.float32)
    in_prompt = jnp.asarray([np.isin(np.arange(size), IN_PROMPT)])
    counts = jnp.asarray([np.bincount(OUTPUT, minlength=size)], jnp.int32)
    others = dict(parameters)
    logit_bias = {int(token): b for token, b in others.pop("logit_bias", {}).items()}
    bias = jnp.asarray(
        sampling.make_bias(size, logit_bias, others.pop("allowed_tokens", None))[None]
    )
    params = sampling.make_params(seed=seed, **others)
    steps = (jnp.asarray([step], jnp.int32) for step in range(16))
    return [
        int(sampling.sample(logits, params, t, bias, in_prompt, counts).tokens[0]) for t in steps
    ]


def block(values: list) -> str:
    """Return a fenced JSON list, an entry a line."""
    return "```json\n[\n" + ",\n".join(f"  {json.dumps(v)}" for v in values) + "\n]\n```"


if __name__ == "__main__":
    seeds = [(0, 0), (7, 0), (7, 1), (2**32 + 7, 0), (9_999_999_999, 255), (2**64 - 1, 4095)]
    print(block([{"seed": s, "step": t, "gumbel": noise(s, t)} for s, t in seeds]))
    print(block([{"seed": s, "parameters": p, "tokens": tokens(s, p)} for s, p in CASES]))
