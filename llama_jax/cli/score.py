"""The verb score: the log-likelihood and perplexity of a text, or of each text in a file."""

import sys
import time
from typing import Any

from llama_jax.batch import Batch
from llama_jax.batch.score import figures, read_total, score_figures, score_format
from llama_jax.cli.batch import warn_of_ignored
from llama_jax.cli.console import indented_json, note
from llama_jax.cli.files import read_prompt
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import load_model
from llama_jax.cli.refusals import refuse_flags
from llama_jax.cli.requests import parse_tokens
from llama_jax.engine.score import Text
from llama_jax.errors import InputError
from llama_jax.progress import progress_bar

_TEXTS = ("prompt", "prompt_file", "prompt_tokens")

_NAMES = {
    "num_tokens": "tokens",
    "num_bytes": "bytes",
    "logprob": "log-likelihood (nats)",
    "nats_per_token": "nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


def score() -> None:
    """Score the text or the file of texts that the flags name."""
    if FLAGS.input is None:
        _score_text()
    else:
        _score_file()


def _score_text() -> None:
    if FLAGS.output not in ("text", "json"):
        raise InputError(f"--output is {FLAGS.output!r:.40}, expected text or json")
    if FLAGS.token_logprobs and FLAGS.output != "json":
        raise InputError("--token_logprobs is given without --output=json, which has them; add it")
    text = _read_text()
    llm, began = load_model(), time.perf_counter()
    result = llm.score(
        text,
        FLAGS.continuation,
        stride=FLAGS.stride,
        parse_control=FLAGS.parse_control,
        progress=sys.stderr.isatty(),
    )
    for warning in result.warnings:
        note(f"warning: {warning}")
    if FLAGS.output == "json":
        row = score_figures(result, logprobs=FLAGS.token_logprobs)
        print(indented_json(row))
    else:
        _print_table(figures(result))
    precision = llm.config.precision(llm.dtype)
    note(f"scored in {time.perf_counter() - began:.2f} s | {precision} | {result.fingerprint}")


def _read_text() -> Text:
    """Return the text or the ids that a flag gives."""
    given = [f"--{name}" for name in _TEXTS if FLAGS[name].value is not None]
    if len(given) != 1:
        raise InputError(
            f"score has {' and '.join(given) or 'no text'}, expected one of --prompt, "
            "--prompt_file, --prompt_tokens and --input"
        )
    if FLAGS.prompt_tokens is None:
        return read_prompt() or ""
    refuse_flags("--prompt_tokens", "which are no text", "parse_control", "continuation")
    return parse_tokens("prompt_tokens", FLAGS.prompt_tokens)


def _score_file() -> None:
    others = (*_TEXTS, "continuation", "parse_control")
    refuse_flags("--input", "whose lines have the texts", *others)
    if FLAGS.output in ("text", "json"):
        raise InputError("score needs --output with --input: the file of results; name one")
    format_of = score_format(stride=FLAGS.stride, logprobs=FLAGS.token_logprobs)
    with Batch(FLAGS.input, FLAGS.output, format_of) as work:
        if work.done:
            note(f"{work.output} has {work.done:,} of {work.total:,} results already; resuming")
        llm = load_model()
        with progress_bar(total=work.total, initial=work.done, unit="text") as bar:
            for _ in work.run(llm):
                bar.update()
    warn_of_ignored(work)
    total = read_total(work.output)
    if len(total.fingerprints) > 1:
        note(f"warning: {work.output} has results of {len(total.fingerprints)} models or settings")
    if total.likelihood is not None:
        _print_table(
            {"texts": total.texts, "greedy texts": total.greedy, **figures(total.likelihood)}
        )
    if work.failed:
        raise InputError(
            f"{work.failed:,} of {work.total:,} texts have an `error` in {work.output}; "
            "fix them and score them as another file"
        )


def _print_table(figures: dict[str, Any]) -> None:
    """Print a line for each figure that there is."""
    for name, value in figures.items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
            print(f"{_NAMES.get(name, name):<22}{shown:>16}")
