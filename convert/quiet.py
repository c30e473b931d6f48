"""Keep Orbax's copies of an error off the terminal."""

import logging
import sys
import threading

from llama_jax.errors import innermost_package

_LIBRARIES = ("asyncio", "concurrent", "etils", "orbax", "tensorstore")


def mute_orbax() -> None:
    """Drop what Orbax logs and what its threads print.

    After a failed write Orbax raises the error, logs it in pages, and its threads print it again.
    Exceptions that other code raised in a thread or a finalizer are still shown.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def show_in_thread(args: threading.ExceptHookArgs) -> None:
        if innermost_package(args.exc_value) not in _LIBRARIES:
            in_thread(args)

    def show_unraisable(args: "sys.UnraisableHookArgs") -> None:
        if innermost_package(args.exc_value) not in _LIBRARIES:
            unraisable(args)

    threading.excepthook, sys.unraisablehook = show_in_thread, show_unraisable
