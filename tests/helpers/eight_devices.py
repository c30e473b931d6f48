"""Tests that are run in a process of eight devices, which XLA simulates on the CPU."""

import os
import subprocess
import sys

from tests.helpers import ROOT


def run_cases(module, *arguments):
    """Run the cases of a module of this folder; return what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "addopts=", f"tests/helpers/{module}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout
