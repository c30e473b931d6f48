"""The commands that a document quotes, run as they are written."""

import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator

from tests.helpers import ROOT


def blocks(text: str, language: str = "sh") -> list[str]:
    """Return the content of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: pathlib.Path) -> str:
    """Run a command in a folder, as a user of the checkout would; return its stdout."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def shell(block: str, folder: pathlib.Path) -> str:
    """Run a block of shell commands, the first failure of which ends it; return its stdout."""
    return run(["bash", "-euo", "pipefail", "-c", block], folder)


@contextlib.contextmanager
def serving(command: str, folder: pathlib.Path) -> Iterator[int]:
    """Start a `python run.py serve` command; yield its port, and then stop it.

    On a free port, and with two slots, which has fewer programs to compile.
    """
    program, *arguments = shlex.split(command, comments=True)
    assert program == "python"
    server = subprocess.Popen(
        [sys.executable, *arguments, "--port=0", "--slots=2"],
        cwd=folder,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr
    try:
        ready = next(line for line in server.stderr if "serving @cf/meta/" in line)
        # The access log must not fill the pipe.
        log = threading.Thread(target=server.stderr.read)
        log.start()
        yield int(re.findall(r"127\.0\.0\.1:(\d+)", ready)[0])
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0
        log.join()
        server.stderr.close()


def _environment() -> dict[str, str]:
    """Return the environment of this process, its Python first, and without a checkpoint."""
    kept = {k: v for k, v in os.environ.items() if k != "LLAMA_JAX_CHECKPOINT"}
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PYTHONPATH": str(ROOT), "PATH": path}
