"""What the conversion says to the person, on stderr."""

import sys


def report(message: str) -> None:
    """Print a line to stderr."""
    print(message, file=sys.stderr)
