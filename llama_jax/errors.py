"""The exception for a user's mistake, and how to tell one from a bug."""

import traceback
from collections.abc import Sequence


class InputError(ValueError):
    """A mistake in the caller's input; the message names what, got, expected and remedy.

    It is raised at the public interface, before anything is traced or written. The command line
    prints it as one line and exits 2. Every other exception is a bug or a fault of the machine.
    """


_LISTED = 20
_LINE = 2000


def one_line(problems: Sequence[str]) -> str:
    """Join problems into one line; of many, the first and how many more there are."""
    more = f"; and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more


def printable(error: object) -> str:
    """Return an error's text as one line for a terminal.

    A file from outside may have names with control characters, and names of any length.
    """
    text = " ".join(str(error).split())
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * _LINE])
    return escaped if len(escaped) <= _LINE else f"{escaped[: _LINE - 600]} ... {escaped[-600:]}"


def innermost_package(error: BaseException | None) -> str:
    """Return the top-level package whose code raised an exception; "" if it has no traceback.

    It tells a library's complaint about a corrupted file from a bug of our own.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)] if error else []
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] if frames else ""
