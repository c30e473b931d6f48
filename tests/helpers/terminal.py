"""A pseudo-terminal that a program runs in, and what a person would type there."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from typing import Self

from tests.helpers import ROOT

READY = "\x1b[?2004h"
"""prompt_toolkit asks the terminal to mark pastes: it waits for a line now."""
_START = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to it
os.execv(sys.argv[1], sys.argv[1:])
"""

CTRL_C, CTRL_D, UP, ALT_ENTER = "\x03", "\x04", "\x1b[A", "\x1b\r"


def paste(text: str) -> str:
    """Return what a terminal sends for a paste."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """`python run.py ARGUMENTS` in a terminal of 80 columns; it is killed in the end.

    Args:
        *arguments: of run.py.
        deadline_s: of each wait.
        **env: further environment variables.
    """

    def __init__(self, *arguments: str, deadline_s: float = 120, **env: str):
        self._deadline_s = deadline_s
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, sys.executable, "run.py", *arguments],
            cwd=ROOT,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | env,
            start_new_session=True,
        )
        os.close(follower)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)

    def type(self, keys: str) -> None:
        """Send keys."""
        os.write(self._leader, keys.encode())

    def ask(self, keys: str) -> str:
        """Send keys and Enter; return what the terminal shows until the next line can be typed."""
        self.type(keys + "\r")
        return self.read_until(READY)

    def read_until(self, mark: str) -> str:
        """Return what is shown, without what moves and colours it, until `mark` was written.

        Raises:
            TimeoutError: it was not, with what was.
        """
        written, ends = "", time.monotonic() + self._deadline_s
        while mark not in written:
            ready, _, _ = select.select([self._leader], [], [], max(0, ends - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {mark!r} in {written!r}")
            try:
                written += os.read(self._leader, 4096).decode(errors="replace")
            except OSError:  # Linux: the program ended
                raise TimeoutError(f"the program ended without {mark!r}: {written!r}") from None
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", written)

    def end(self) -> int:
        """Wait for the program's end; return its exit status."""
        return self.process.wait(timeout=self._deadline_s)
