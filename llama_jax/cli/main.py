"""Dispatch: from a command line to its verb, and from a mistake to one line and exit 2."""

import functools
import io
import os
import sys
from collections.abc import Callable

from absl import app, logging
from absl import flags as absl_flags

from llama_jax.cli import flags
from llama_jax.cli.batch import batch
from llama_jax.cli.chat import chat
from llama_jax.cli.compare import compare
from llama_jax.cli.console import (
    LineFormatter,
    log_once,
    lose_what_stderr_refuses,
    note,
    writing_stdout,
)
from llama_jax.cli.estimate import estimate
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.generate import generate
from llama_jax.cli.help import help_text, version_text
from llama_jax.cli.processes import run_on_all
from llama_jax.cli.refusals import refuse_flags_of_other_verbs
from llama_jax.cli.replay import replay
from llama_jax.cli.score import score
from llama_jax.cli.selftest import selftest
from llama_jax.cli.serve import serve
from llama_jax.cli.sweep import sweep
from llama_jax.cli.verbs import VERBS
from llama_jax.cli.verify_receipt import verify_receipt
from llama_jax.errors import InputError, printable

_RUN: dict[str, Callable[..., None]] = {
    "": generate,
    "chat": chat,
    "batch": batch,
    "score": score,
    "sweep": sweep,
    "replay": replay,
    "verify_receipt": verify_receipt,
    "compare": compare,
    "selftest": selftest,
    "serve": serve,
}


def entry() -> None:
    """Run the command `llama-jax`."""
    lose_what_stderr_refuses()
    flags.define()
    with writing_stdout():
        app.run(main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse a command line; return the program's name and the other arguments that are no flags.

    A request for help or the version is answered and exits 0; a mistake is one line and exits 2.
    """
    if {"--help", "-h"} & set(argv[1:]):  # absl's own exits 1
        print(help_text(argv))
        sys.exit(0)
    if "--version" in argv[1:]:
        print(version_text())
        sys.exit(0)
    try:
        return FLAGS(argv)
    except absl_flags.Error as error:
        note(f"error: {str(error).removeprefix('ERROR:: ')}; see --help")
        sys.exit(2)


def main(argv: list[str]) -> None:
    """Run what a parsed command line asks for; a mistake in it is one line and exit 2."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.DEBUG if FLAGS.debug else logging.WARNING)
    log_once(logging.get_absl_handler())
    if not FLAGS.debug:
        logging.get_absl_handler().setFormatter(LineFormatter())
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # invalid UTF-8 must not end in a traceback
            stream.reconfigure(errors=errors)
    try:
        _run_verb(argv[1:])
    except InputError as error:
        if FLAGS.debug:
            raise
        note(f"error: {printable(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        note("")
        # XLA's threads may be compiling: the interpreter's own exit would free what they use.
        os._exit(130)


def _run_verb(arguments: list[str]) -> None:
    name, *operands = arguments or [""]
    verb = VERBS.get(name)
    if verb is None or len(operands) != len(verb.operands):
        expected = ", ".join(" ".join([v.name, *v.operands]) for v in VERBS.values() if v.name)
        raise InputError(
            f"got the argument {' '.join(arguments)!r:.80}, expected {expected} or none; a prompt "
            "goes to --prompt"
        )
    refuse_flags_of_other_verbs(verb)
    if FLAGS.estimate:
        return estimate(verb)
    for flag in ("config", "chip"):
        if FLAGS[flag].present:
            raise InputError(f"--{flag} is given without --estimate; add it")
    run = functools.partial(_RUN[name], *operands)
    return run_on_all(run) if verb.runs_model else run()
