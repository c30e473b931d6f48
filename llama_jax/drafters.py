"""Drafters: what `--speculate` names, opened for a model."""

import os
import pathlib

import jax

from llama_jax.decode.executor import Executor
from llama_jax.decode.memory import check_fits
from llama_jax.decode.plan import choose_plan
from llama_jax.engine.draft_model import DraftModel
from llama_jax.engine.drafter import Drafter
from llama_jax.engine.ngrams import NgramDrafter
from llama_jax.errors import InputError
from llama_jax.nn.sharding import find_mesh
from llama_jax.weights.checkpoint import Checkpoint, load_checkpoint, open_checkpoint

OFF, NGRAM = "off", "ngram"

DEFAULT_TOKENS = 3
"""Drafts of a pass: with the last token they are 4 rows, which a CPU computes in little more time
than one."""

MAX_TOKENS = 15


def check_speculation(speculate: str | os.PathLike[str] | None, tokens: int) -> int:
    """Return the `draft_tokens` of a plan: 0 if nothing is to be drafted.

    Args:
        speculate: "off" (or None), "ngram", or the path of a checkpoint.
        tokens: drafts of a pass, at most.

    Raises:
        InputError: there are too few or too many drafts, or several processes have a draft model.
    """
    if type(tokens) is not int or not 1 <= tokens <= MAX_TOKENS:
        raise InputError(f"speculate_tokens is {tokens!r}, expected 1 to {MAX_TOKENS}")
    if speculate in (None, OFF):
        return 0
    if speculate != NGRAM and jax.process_count() > 1:
        raise InputError(
            f"speculate is {os.fspath(speculate)!r}, but a model of several processes cannot have "
            f"a draft model; choose {NGRAM} or {OFF}"
        )
    return tokens


def open_drafter(
    speculate: str | os.PathLike[str] | None,
    executor: Executor,
    checkpoint: Checkpoint,
    determinism: str,
) -> Drafter | None:
    """Return what drafts for a model; None: nothing does.

    A draft model is on one device, the default one, in the run's dtype.

    Args:
        speculate: see `check_speculation`.
        executor: the model's; its plan has the `draft_tokens`.
        checkpoint: the model's.
        determinism: see `choose_plan`.

    Raises:
        InputError: the draft model has another vocabulary, there is no room for it, or see
            `load_checkpoint`.
    """
    draft_tokens = executor.plan.draft_tokens
    if speculate is None or not draft_tokens:
        return None
    if speculate == NGRAM:
        return NgramDrafter()
    path = pathlib.Path(speculate)
    _, config = open_checkpoint(path)
    plan = choose_plan(config, checkpoint.dtype, determinism).speculating(draft_tokens)
    context = min(executor.context, config.max_seq_len)
    check_fits(config, plan, executor.batch, context, find_mesh(config, 1, 1))
    small = load_checkpoint(path, checkpoint.dtype)
    _check_vocabulary(path, small, checkpoint)
    return DraftModel(
        Executor(
            config,
            small.params,
            checkpoint.dtype,
            batch=executor.batch,
            context=context,
            plan=plan,
            drawable=executor.programs.drawable,
        )
    )


def _check_vocabulary(path: pathlib.Path, small: Checkpoint, large: Checkpoint) -> None:
    """Refuse a draft model whose ids mean other tokens."""
    sizes = small.config.vocab_size, large.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft model {path} has {sizes[0]:,} tokens, expected {sizes[1]:,}, those of the "
            "model that it drafts for; choose one of the same vocabulary"
        )
    digests = small.tokenizer_digest, large.tokenizer_digest
    if None not in digests and digests[0] != digests[1]:
        raise InputError(
            f"the draft model {path} has another tokenizer than the model that it drafts for; "
            "choose one of the same vocabulary"
        )
