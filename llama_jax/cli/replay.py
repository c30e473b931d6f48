"""The verb replay: run again what receipts say, and compare."""

import collections
import itertools
import json
import sys
from typing import Any

from llama_jax.cli.console import note
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.keys import read_public_key
from llama_jax.cli.model import load_model
from llama_jax.errors import InputError, printable
from llama_jax.progress import progress_bar
from llama_jax.receipt.reading import Receipt, read_receipts
from llama_jax.replay import Verdict
from llama_jax.replay import replay as run_again
from llama_jax.replay.verdict import Outcome


def replay(path: str) -> None:
    """Print a verdict for each receipt of a file.

    The exit status is 1 if one diverged, else 2 if one cannot be run here.

    Args:
        path: as `read_receipts` takes it.
    """
    if FLAGS.output not in ("text", "json"):
        raise InputError(f"--output is {FLAGS.output!r:.40}, expected text or json")
    receipts = list(read_receipts(path, read_public_key()))
    verdicts: list[Verdict] = []
    with progress_bar(total=len(receipts), unit="receipt") as bar:
        # A model is loaded once for receipts in a row that can share it.
        for settings, group in itertools.groupby(receipts, key=_settings):
            verify = FLAGS.verify or not FLAGS["verify"].present
            llm = load_model(slots=8, verify=verify, **settings)
            for verdict in run_again(llm, group, prefill=FLAGS.prefill):
                verdicts.append(verdict)
                _print(verdict)
                bar.update()
    counts = collections.Counter(each.outcome for each in verdicts)
    note(", ".join(f"{count:,} {outcome.name}" for outcome, count in counts.most_common()))
    if Outcome.DIVERGED in counts:
        sys.exit(Outcome.DIVERGED.status)
    if Outcome.NOT_REPLAYABLE in counts:
        sys.exit(Outcome.NOT_REPLAYABLE.status)


def _settings(receipt: Receipt) -> dict[str, Any]:
    """Return the arguments of `Llama.load` that a run had."""
    parts = receipt.environment.parts
    determinism = "fast" if parts["invariance"] == "none" else "strict"
    eos_tokens = parts["config"]["eos_tokens"]
    return {"dtype": parts["dtype"], "determinism": determinism, "eos_tokens": eos_tokens}


def _print(verdict: Verdict) -> None:
    """Print a verdict: one line."""
    if FLAGS.output == "json":
        print(json.dumps(verdict.to_statement()), flush=True)
    else:
        print(printable(verdict), flush=True)
