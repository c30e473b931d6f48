"""Signals: those that end the server by a drain, and those that must not end it.

Everything else keeps the system's own effect: SIGKILL and SIGQUIT end the process at once.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator

_DRAINING = ("SIGINT", "SIGTERM", "SIGHUP")
_IGNORED = ("SIGUSR1", "SIGUSR2", "SIGPIPE")
"""Log rotation, supervisors and broken pipes send them; by default each ends the process."""


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Ignore meanwhile the signals that have no meaning here."""
    with _handled(_IGNORED, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def draining(on_signal: Callable[[], None]) -> Iterator[None]:
    """Call a function meanwhile on each signal that asks the server to end.

    SIGHUP stays ignored where it is ignored at the start: `nohup` asks for that.
    """
    hangup = getattr(signal, "SIGHUP", None)
    unasked = hangup is not None and signal.getsignal(hangup) == signal.SIG_IGN
    names = tuple(name for name in _DRAINING if not (name == "SIGHUP" and unasked))
    with _handled(names, lambda _number, _frame: on_signal()):
        yield


@contextlib.contextmanager
def _handled(names: tuple[str, ...], handler: Callable | signal.Handlers) -> Iterator[None]:
    numbers = [
        getattr(signal, name) for name in names if hasattr(signal, name)
    ]  # Windows lacks some
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
