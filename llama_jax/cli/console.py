"""What the command line says to the person, on stderr."""

import sys

from llama_jax.engine.result import Result
from llama_jax.llama import Llama


def note(text: str) -> None:
    """Print a line to stderr: stdout is for the generated text."""
    print(text, file=sys.stderr, flush=True)


def summary(llm: Llama, result: Result, repeat: str) -> str:
    """Return one line: where the time went, and how to repeat the run.

    Args:
        llm: the model that ran.
        result: what it returned.
        repeat: how to pass the seed again, "{}" standing for it; empty: the user gave the seed.
    """
    t = result.timings
    parts = [f"load {t.load_s:.2f} s", f"compile {t.compile_s:.2f} s"]
    if t.prefill_tokens_per_s is not None:
        prefilled = result.usage.prompt_tokens - result.usage.cached_tokens
        parts.append(
            f"prefill {prefilled} tokens in {t.prefill_s:.3f} s "
            f"({t.prefill_tokens_per_s:,.0f} tok/s)"
        )
    if t.decode_tokens_per_s is not None:
        rate = t.decode_tokens_per_s
        parts.append(
            f"decode {t.decode_s:.3f} s "
            f"({rate:,.0f} tok/s, {rate * llm.weight_bytes_per_token / 1e9:.2f} GB/s of weights)"
        )
    parts.append(f"{result.usage.completion_tokens} tokens, {result.finish_reason}")
    seed = f"seed {result.seed}"
    if repeat:
        seed += f" (drawn; {repeat.format(result.seed)} repeats this)"
    return " | ".join([*parts, llm.dtype, seed])
