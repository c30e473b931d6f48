"""Processes of several devices, which XLA simulates on the CPU."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.helpers import ROOT


def run_cases(module, *arguments):
    """Run the cases of a module of this folder on eight devices; return what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    return _run(8, *command, "-o", "addopts=", f"tests/helpers/{module}.py", *arguments)


def run_code(code: str, *arguments: Any) -> Any:
    """Run code on four devices; return what it printed in JSON.

    Args:
        code: its `sys.argv[1:]` are the arguments.
        *arguments: passed on in JSON.
    """
    return json.loads(_run(4, sys.executable, "-c", code, *map(json.dumps, arguments)))


def _run(devices: int, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout
