"""The exception for a user's mistake, and how to tell one from a bug."""

import traceback


class InputError(ValueError):
    """A mistake in the caller's input; the message names what, got, expected and remedy.

    It is raised at the public interface, before anything is traced or written. The command line
    prints it as one line and exits 2. Every other exception is a bug or a fault of the machine.
    """


def one_line(problems: list[str]) -> str:
    """Join all problems into one line."""
    return "; ".join(problems)


def innermost_package(error: BaseException | None) -> str:
    """Return the top-level package whose code raised an exception; "" if it has no traceback.

    It tells a library's complaint about a corrupted file from a bug of our own.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)] if error else []
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] if frames else ""
