"""The verb sweep: one prompt, many seeds."""

import dataclasses
import json
import re

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import load_model
from llama_jax.cli.receipts import open_receipts
from llama_jax.cli.requests import read_request
from llama_jax.engine.request import GenerationRequest
from llama_jax.errors import InputError
from llama_jax.progress import progress_bar

_MOST = 2**64


def sweep() -> None:
    """Print a result for each seed, a line of JSON each, in the order of the seeds."""
    seeds = parse_seeds(FLAGS.seeds)
    request, _ = read_request()
    with open_receipts() as receipts:
        llm = load_model(slots=8, requests=[request])
        requests = (_with_seed(request, seed) for seed in seeds)
        results = progress_bar(llm.generate_all(requests), total=len(seeds), unit="seed")
        for result in results:
            print(json.dumps(result.to_dict(), ensure_ascii=False), flush=True)
            if receipts is not None:
                receipts.append(result)


def parse_seeds(text: str | None) -> range | list[int]:
    """Return the seeds that --seeds names: 0:64 is 0 to 63, 0:64:2 every second, 1,5,9 these.

    Raises:
        InputError: it is of another form, names none, or one out of range.
    """
    seeds: range | list[int] = []
    if text is not None and re.fullmatch(r"\d{1,20}:\d{1,20}(:[1-9]\d{0,18})?", text):
        seeds = range(*map(int, text.split(":")))
    elif text is not None and re.fullmatch(r"\d{1,20}(,\d{1,20})*", text):
        seeds = [int(part) for part in text.split(",")]
    if not seeds or (max(seeds) if isinstance(seeds, list) else seeds[-1]) >= _MOST:
        raise InputError(
            f"--seeds is {text!r:.40}, expected seeds from 0 to 2^64 - 1, such as 0:64 or 1,5,9"
        )
    return seeds


def _with_seed(request: GenerationRequest, seed: int) -> GenerationRequest:
    parameters = dataclasses.replace(request.parameters, seed=seed)
    return dataclasses.replace(request, parameters=parameters)
