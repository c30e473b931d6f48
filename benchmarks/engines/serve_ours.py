"""This project's server, on weights that need not be a checkpoint's; or its batch, without one.

    python -m benchmarks.engines.serve_ours serve SETTINGS
    python -m benchmarks.engines.serve_ours batch SETTINGS < PROMPTS

SETTINGS and PROMPTS are JSON: the arguments of `make_llama` and of `run_batch`. `batch` prints what
the latter returns.
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from benchmarks.weights import make_weights
from llama_jax.config import ModelConfig
from llama_jax.decode.compile_cache import use_compile_cache
from llama_jax.llama import Llama


def make_llama(
    *,
    config: dict[str, Any],
    dtype: str,
    checkpoint: str | None,
    tokenizer: str | None,
    slots: int,
    context: int,
) -> Llama:
    """Return the model that is measured.

    Args:
        config: fields of the ModelConfig.
        dtype: of weights and cache.
        checkpoint: a folder of weights; None: made-up ones.
        tokenizer: the tokenizer.model of made-up ones.
        slots, context: see `Llama.load`.
    """
    use_compile_cache()
    shape = ModelConfig.from_dict(config, source="the benchmark's settings")
    weights = make_weights(shape, dtype, checkpoint)
    if checkpoint is None and tokenizer is not None:
        weights = dataclasses.replace(weights, tokenizer=pathlib.Path(tokenizer))
    return Llama(weights, slots=slots, context=context)


def run_batch(llama: Llama, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Return seconds and tokens of all prompts, as many at once as there are slots; cores used."""
    for _ in llama.engine.warm_up():
        pass

    def run(some: list[list[int]], length: int) -> int:
        wanted = {"max_tokens": length, "temperature": 0, "ignore_eos": True}
        requests = ({"prompt_tokens": tokens, **wanted} for tokens in some)
        return sum(r.usage.completion_tokens for r in llama.generate_all(requests))

    first = [tokens[::-1] for tokens in prompts[: llama.executor.batch]]
    run(first, 2)  # touches the memory of every slot, and begins otherwise than what is timed
    began, cpu_began = time.perf_counter(), time.process_time()
    tokens = run(prompts, new_tokens)
    seconds = time.perf_counter() - began
    cores = (time.process_time() - cpu_began) / seconds
    return {"seconds": seconds, "tokens": tokens, "cores": cores}


def main(way: str, settings: str) -> None:
    """Do one of the two."""
    values = json.loads(settings)
    port = values.pop("port", None)
    if way == "batch":
        print(json.dumps(run_batch(make_llama(**values), **json.load(sys.stdin))))
        return
    from llama_jax.server.serve import serve

    serve(lambda: make_llama(**values), port=port)


if __name__ == "__main__":
    main(*sys.argv[1:])
