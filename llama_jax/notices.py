"""Lines for the person at the terminal, from modules that cannot see the command line."""

import logging
import sys

from absl import logging as absl_logging


def warn(logger: logging.Logger, message: str) -> None:
    """Log a warning of one line.

    absl, under which the command line runs, would put the time, a thread and a source line before
    it. Where its handler is in use, the line goes to stderr as it is, and to no other handler.
    """
    if not logger.isEnabledFor(logging.WARNING):
        return
    if absl_logging.get_absl_handler() in logging.getLogger().handlers:
        if sys.stderr is not None:  # `2>&-` closes it
            print(message, file=sys.stderr, flush=True)
    else:
        logger.warning("%s", message)
