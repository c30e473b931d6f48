"""What the command line says to the person, on stderr."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.engine.result import Result
from llama_jax.llama import Llama


class _Lossy(io.FileIO):
    """A file descriptor that drops what it cannot write."""

    def write(self, data: Any) -> int:
        """Write, or lose it."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def lose_what_stderr_refuses() -> None:
    """Go on where stderr is a file on a full disk, or a pipe that nobody reads any more."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        raw = _Lossy(sys.stderr.fileno(), "w", closefd=False)
        encoding, errors = sys.stderr.encoding, sys.stderr.errors
        # io.TextIOWrapper takes an unbuffered file; its type says otherwise.
        sys.stderr = io.TextIOWrapper(raw, encoding, errors, line_buffering=True)  # type: ignore[arg-type]


def log_once(handler: logging.Handler) -> None:
    """Let the root logger write to stderr by one handler; importing Orbax gives it another."""
    for other in list(logging.root.handlers):
        if other is not handler and type(other) is logging.StreamHandler:
            logging.root.removeHandler(other)


class LineFormatter(logging.Formatter):
    """Formats log records as the other lines on stderr are: no time, thread or source line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return `warning: ...`, and a traceback if there is one."""
        return f"{record.levelname.lower()}: {super().format(record)}"


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """Write out stdout in the end. If it refuses, say so in one line and exit 2.

    A reader that closed its pipe, as `head` does, has had enough: that is no error.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # `>&-` closes it
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # of another file
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            note(f"error: cannot write stdout ({error.strerror or error}); make room for it")
            sys.exit(2)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a text with a spinner on stderr meanwhile, in a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # a tenth of a second, which only terminals need

    with Console(stderr=True).status(text, spinner="dots"):
        yield


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt again if there was one meanwhile.

    Python drops an exception in a callback that C++ or the garbage collector calls, and a
    compilation calls many: there Ctrl-C may have no effect, but for a traceback on stderr.
    """
    was_interrupted = False
    report = sys.unraisablehook

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        signal.default_int_handler(number, frame)

    def raise_again() -> None:
        if was_interrupted:
            raise KeyboardInterrupt

    def report_others(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            report(dropped)

    before = signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = report_others
    try:
        yield raise_again
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, before)


def note(text: str) -> None:
    """Print a line to stderr: stdout is for the generated text."""
    print(text, file=sys.stderr, flush=True)


def indented_json(value: Any) -> str:
    """Return JSON for a person to read: each list of numbers is one line."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    # No line break of the text is within a string.
    numbers = re.compile(r"\[\n\s+([^\[\]{}\"]+)\n\s+\]")
    return numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", text)


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
    if (drafts := result.speculation) is not None:
        parts.append(
            f"{drafts.tokens_per_pass:.2f} tokens a pass ({drafts.accepted} of {drafts.drafted} "
            "drafts accepted)"
        )
    parts.append(f"{result.usage.completion_tokens} tokens, {result.finish_reason}")
    seed = f"seed {result.seed}"
    if repeat:
        seed += f" (drawn; {repeat.format(result.seed)} repeats this)"
    return " | ".join([*parts, llm.config.precision(llm.dtype), seed])
