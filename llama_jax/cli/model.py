"""The model that the flags name."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from llama_jax.cli.console import note
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.processes import leader
from llama_jax.cli.requests import parse_tokens
from llama_jax.decode.compile_cache import use_compile_cache
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.request import GenerationRequest
from llama_jax.errors import InputError
from llama_jax.hosts.leader import Leader
from llama_jax.llama import Llama
from llama_jax.source import default_checkpoint, find_checkpoint
from llama_jax.weights.processes import OtherProcessError
from llama_jax.weights.quiet import orbax_muted
from llama_jax.weights.stored_tokenizer import load_tokenizer


def checkpoint_path() -> pathlib.Path:
    """Return the checkpoint that the flags or the environment name, else the demo model."""
    if FLAGS.checkpoint is not None:
        return pathlib.Path(FLAGS.checkpoint)
    if (path := default_checkpoint()) == DEMO_CHECKPOINT:
        note("no --checkpoint: running the embedded demo model, which knows only its small corpus")
    return path


def parse_devices() -> int | str:
    """Return what --devices says: a number, or "all"."""
    is_one_of_several = leader() is not None
    text = FLAGS.devices or ("all" if is_one_of_several else "1")
    devices = int(text) if text.isascii() and text.isdigit() else text
    if is_one_of_several and devices not in ("all", jax.device_count()):
        raise InputError(
            f"--devices is {text}, expected all or {jax.device_count()}, those of all processes"
        )
    return "all" if is_one_of_several else devices


def parse_slots(usual: int) -> int:
    """Return what --slots says, by default so many of each replica."""
    return usual * max(1, FLAGS.replicas) if FLAGS.slots is None else FLAGS.slots


def load_model(
    slots: int = 1,
    *,
    checkpoint: pathlib.Path | None = None,
    requests: Sequence[GenerationRequest] = (),
    **instead: Any,
) -> Llama:
    """Load the checkpoint, in all processes.

    Args:
        slots: of each replica, unless --slots is given.
        checkpoint: None: what the flags or the environment name.
        requests: whose prompts are encoded before the weights are read, which may take a minute.
        **instead: arguments of `Llama.load`, in place of those that the flags give.
    """
    if warning := use_compile_cache():
        note(f"warning: {warning}")
    arguments: dict[str, Any] = {
        "dtype": FLAGS.dtype,
        "context": FLAGS.context,
        "slots": parse_slots(slots),
        "determinism": FLAGS.determinism,
        "devices": parse_devices(),
        "replicas": FLAGS.replicas,
        "eos_tokens": FLAGS.eos_tokens and parse_tokens("eos_tokens", FLAGS.eos_tokens),
        "speculate": FLAGS.speculate,
        "speculate_tokens": FLAGS.speculate_tokens,
        "verify": FLAGS.verify,
    } | instead
    with contextlib.nullcontext() if FLAGS.debug else orbax_muted():
        path = find_checkpoint(
            checkpoint or checkpoint_path(),
            arguments["dtype"],
            convert=FLAGS.convert,
            progress=True,
        )
        _check_prompts(path, requests)
        if (others := leader()) is None:
            return Llama.load(path, **arguments, progress=True)
        return _load_in_all(others, path.absolute(), arguments)


def _check_prompts(path: pathlib.Path, requests: Sequence[GenerationRequest]) -> None:
    if requests:
        tokenizer, vocab_size = load_tokenizer(path)
        for request in requests:
            request.encode(tokenizer, vocab_size)


def _load_in_all(others: Leader, path: pathlib.Path, arguments: dict[str, Any]) -> Llama:
    """Load a checkpoint in this process and the others; the one that cannot says why."""
    others.load(path=path, **arguments)
    try:
        llm = Llama.load(path, **arguments, progress=True, lockstep=others)
    except Exception as error:
        if isinstance(error, OtherProcessError) or not isinstance(error, InputError):
            others.fail(error)
        raise
    others.check(llm.engine.fingerprint)
    return llm
