"""The one exception a user's own mistake raises."""


class InputError(ValueError):
    """A mistake in what the caller gave: the message says what, got, expected and remedy.

    Raised at the public edge, before anything is traced or written. The command line prints it as
    one line and exits 2; every other exception is a fault of this program or of the machine.
    """


def one_line(problems: list[str]) -> str:
    """Join every problem found into the single line a user reads."""
    return "; ".join(problems)
