"""Record the runs that `run.py selftest` repeats: `python -m tools.record_selftest`.

Writes llama_jax/demo/selftest.jsonl, a receipt for each request below. Do so after a change of the
demo model or of the sampling law, which needs another version, and for no other reason.
"""

import random
from collections.abc import Iterator
from typing import Any

from absl import app

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT, SELFTEST
from llama_jax.receipt.file import ReceiptFile

QUESTION = "What is the capital of France?"
STORY = "Tell me a story."
MARGIN = 1e-3
"""Of every draw, at least: no rounding of float32 gives another token."""


def requests() -> Iterator[dict[str, Any]]:
    """Yield some sixty requests: each parameter alone, its edges, all together, every length."""
    drawn = {"prompt": STORY, "temperature": 1.3, "max_tokens": 24}
    yield {"prompt": QUESTION, "temperature": 0}
    yield {"prompt": QUESTION, "seed": 7}
    yield {"prompt": QUESTION, "temperature": 5e-6, "seed": 3}  # greedy by the law
    for seed in (0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1):
        yield drawn | {"seed": seed}
    for temperature in (2e-5, 0.1, 0.6, 1, 2, 3.5, 5):
        yield drawn | {"temperature": temperature, "seed": 11}
    for name, values in {
        "top_k": (1, 2, 5, 40, 50),
        "top_p": (0, 0.1, 0.5, 0.9, 1),
        "min_p": (0.01, 0.2, 1),
        "repetition_penalty": (0, 0.5, 1.2, 2),
        "frequency_penalty": (0.3, 2),
        "presence_penalty": (0.7, 2),
    }.items():
        for value in values:
            yield drawn | {"temperature": 2, "seed": 13, name: value}
    for temperature in (0, 2):
        yield drawn | {"temperature": temperature, "seed": 17, "frequency_penalty": 1.5}
    yield drawn | {"seed": 19, "logit_bias": {"299": 4.5, "300": -100}}
    yield drawn | {"seed": 19, "logit_bias": {"2": 100}}
    yield drawn | {"seed": 23, "allowed_tokens": [300, 301, 302, 2], "temperature": 3}
    yield drawn | {"seed": 23, "ignore_eos": True, "prompt": QUESTION}
    yield drawn | {"seed": 29, "stop": ["llama", "."]}
    yield drawn | {"seed": 31, "max_tokens": 1}
    yield drawn | {"seed": 31, "system": "Be brief.", "max_tokens": 60}
    yield {"prompt": "The king", "raw": True, "temperature": 1, "seed": 37, "max_tokens": 40}
    rng = random.Random(0)
    for length in (1, 2, 15, 16, 17, 63, 129, 300, 480):
        ids = [1, *(rng.randrange(3, 1000) for _ in range(length - 1))]
        yield {"prompt_tokens": ids, "temperature": 1, "seed": length, "max_tokens": 12}
    together = {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1}
    together |= {"frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": {"263": 1}}
    for seed in (41, 43, 47):
        yield drawn | together | {"temperature": 2.5, "seed": seed, "max_tokens": 40}


def main(_: list[str]) -> None:
    """Record all of them."""
    llm = Llama.load(DEMO_CHECKPOINT, slots=8, verify=True)
    SELFTEST.unlink(missing_ok=True)
    with ReceiptFile(SELFTEST) as file:
        for result in llm.generate_all(requests()):
            assert result.record is not None
            nearest = min(draw.margin for draw in result.record.draws)
            assert nearest > MARGIN, f"{result.parameters}: margin {nearest}; change its seed"
            file.append(result)
    print(f"{SELFTEST}: {SELFTEST.stat().st_size:,} bytes")


if __name__ == "__main__":
    app.run(main)
