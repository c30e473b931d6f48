"""Run a benchmark of the demo's shape, as its users do."""

import json
import subprocess
import sys

from tests.helpers import ROOT


def measure(module, tmp_path, *flags):
    """Run a command on the demo's shape; return its record."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"benchmarks.{module}", "--shape=demo", "--rounds=1", *flags),
            *("--name=it", f"--output={tmp_path}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "it.json").read_text("utf-8"))
