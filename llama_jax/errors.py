"""The exception for a user's mistake."""


class InputError(ValueError):
    """A mistake in the caller's input; the message names what, got, expected and remedy.

    It is raised at the public interface, before anything is traced or written. The command line
    prints it as one line and exits 2. Every other exception is a bug or a fault of the machine.
    """


def one_line(problems: list[str]) -> str:
    """Join all problems into one line."""
    return "; ".join(problems)
