"""Progress of long work on stderr: a bar in a terminal, elsewhere a line for each tenth of it."""

import sys
from collections.abc import Iterable, Sized
from typing import Any, TextIO

from tqdm import tqdm

_LINE = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt})"


class _Lines:
    """A file that keeps of what tqdm writes the texts, each as a line, each once.

    tqdm moves to the begin of the line before each, and writes blanks over the one before.
    """

    def __init__(self, file: TextIO):
        self._file, self._last = file, ""

    def write(self, text: str) -> None:
        if (line := text.strip()) and line != self._last:
            self._last = line
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


def say(text: str, *, shown: bool = True) -> None:
    """Write a line, if there is a text."""
    if text and shown:
        print(text, file=sys.stderr, flush=True)


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str,
    label: str | None = None,
    shown: bool = True,
    **options: Any,
) -> tqdm:
    """Return tqdm's bar, shown once the work takes over a second.

    Args:
        iterable: whose items are passed on and counted; None: call `update`.
        total: units of work; None: as many as the iterable, a collection, has.
        unit: the name of one; "B" for bytes.
        label: what is done; None: the units.
        shown: False: nothing is written.
        **options: other arguments of tqdm.
    """
    if total is None:
        assert isinstance(iterable, Sized), "a stream has no length"
        total = len(iterable)
    options = {"delay": 1} | options | {"file": sys.stderr, "disable": not shown}
    options["unit_scale"] = unit == "B"
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "bar_format": _LINE}
        options |= {"miniters": max(1, total // 10), "mininterval": 0}
    return tqdm(iterable, total=total, unit=unit, desc=label or f"{unit}s", **options)
