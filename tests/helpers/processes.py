"""`run.py` in several processes that run one model together."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from tests.helpers import ROOT

END_S = 600
"""In which a run must end, on a machine that has much else to do."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def launch(process: int, processes: int = 2, port: int | None = None) -> list[str]:
    """Return the flags of one process."""
    return [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={processes}",
        f"--process_id={process}",
    ]


@contextlib.contextmanager
def started(
    *arguments: str,
    environments: Sequence[Mapping[str, str]] = ({}, {}),
    by_flags: bool = True,
    folders: Sequence[pathlib.Path] = (ROOT, ROOT),
) -> Iterator[list[subprocess.Popen]]:
    """Start one process for each environment, the first one last; none outlives the block.

    Args:
        *arguments: of all.
        environments: added to this process's, for each.
        by_flags: tell them of each other by flags; else the environments do.
        folders: where each runs.
    """
    port, count = free_port(), len(environments)
    running: list[subprocess.Popen] = []
    for index in reversed(range(count)):
        command = [sys.executable, str(ROOT / "run.py"), *arguments]
        if by_flags:
            command += launch(index, count, port)
        process = subprocess.Popen(
            command,
            cwd=folders[index],
            env=os.environ | environments[index],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.insert(0, process)
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ends(running: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Wait for the end of all; return their exit statuses, stdout and stderr."""
    said = [process.communicate(timeout=END_S) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]
