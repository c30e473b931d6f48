"""Keep Orbax's copies of an error off the terminal."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

from llama_jax.errors import innermost_package

_LIBRARIES = ("asyncio", "concurrent", "etils", "orbax", "tensorstore")
_LOGGERS = ("absl", "asyncio")


@contextlib.contextmanager
def orbax_muted() -> Iterator[None]:
    """Drop what Orbax logs and what its threads print.

    After a failed write Orbax raises the error, logs it in pages, and its threads print it again,
    some of them late. So it stays muted after an error. Exceptions that other code raised in a
    thread or a finalizer are still shown.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def show_in_thread(args: threading.ExceptHookArgs) -> None:
        if innermost_package(args.exc_value) not in _LIBRARIES:
            in_thread(args)

    def show_unraisable(args: "sys.UnraisableHookArgs") -> None:
        if innermost_package(args.exc_value) not in _LIBRARIES:
            unraisable(args)

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook, sys.unraisablehook = show_in_thread, show_unraisable
    yield
    threading.excepthook, sys.unraisablehook = in_thread, unraisable
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
