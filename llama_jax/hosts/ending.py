"""Ending: how a process ends that others have left in the midst of a computation."""

import os
import sys
import threading
from typing import NoReturn

_ONCE = threading.Lock()


def end_process(status: int, line: str = "") -> NoReturn:
    """Say why, and end at once, whatever other threads do: they may wait for a lost process.

    Args:
        status: of the exit.
        line: what to print to stderr; the first caller's is.
    """
    with _ONCE:  # never left: who comes second waits for the end
        if line:
            print(line, file=sys.stderr, flush=True)
        os._exit(status)
