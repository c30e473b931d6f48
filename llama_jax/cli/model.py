"""The model that the flags name."""

import contextlib
import pathlib
import sys

from llama_jax.cli.console import note
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.requests import parse_tokens
from llama_jax.decode.compile_cache import use_compile_cache
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.llama import Llama
from llama_jax.source import default_checkpoint
from llama_jax.weights.quiet import orbax_muted


def checkpoint_path() -> pathlib.Path:
    """Return the checkpoint that the flags or the environment name, else the demo model."""
    if FLAGS.checkpoint is not None:
        return pathlib.Path(FLAGS.checkpoint)
    if (path := default_checkpoint()) == DEMO_CHECKPOINT:
        note("no --checkpoint: running the embedded demo model, which knows only its small corpus")
    return path


def parse_devices() -> int | str:
    """Return what --devices says: a number, or "all"."""
    text = FLAGS.devices
    return int(text) if text.isascii() and text.isdigit() else text


def load_model(slots: int = 1, max_queue: int | None = None) -> Llama:
    """Load the checkpoint; --slots takes precedence over `slots`."""
    if warning := use_compile_cache():
        note(f"warning: {warning}")
    with contextlib.nullcontext() if FLAGS.debug else orbax_muted():
        return Llama.load(
            checkpoint_path(),
            dtype=FLAGS.dtype,
            context=FLAGS.context,
            slots=slots if FLAGS.slots is None else FLAGS.slots,
            max_queue=max_queue,
            determinism=FLAGS.determinism,
            devices=parse_devices(),
            eos_tokens=FLAGS.eos_tokens and parse_tokens("eos_tokens", FLAGS.eos_tokens),
            verify=FLAGS.verify,
            convert=FLAGS.convert,
            progress=sys.stderr.isatty(),
        )
