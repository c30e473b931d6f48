"""in_thread: the work of a request in a thread, which ends before the request does."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def in_thread(
    function: Callable[..., _T], *args: Any, on_cancel: Callable[[], None] = lambda: None
) -> _T:
    """Return what a function returns that is called in a thread.

    A thread cannot be interrupted. If the caller is cancelled, it first waits for the function's
    end: a request must not end, and free its share of `BodyBudget`, while a thread still holds its
    body. A function that has not begun by then is not called.

    Args:
        function: what to call.
        *args: its arguments.
        on_cancel: called at once if the caller is cancelled.
    """
    cancelled = threading.Event()

    def call() -> _T:
        if cancelled.is_set():
            raise asyncio.CancelledError
        return function(*args)

    work = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        cancelled.set()
        on_cancel()
        await asyncio.gather(work, return_exceptions=True)
        raise
