"""The command line in tests, as a process of its own."""

import subprocess
import sys
from typing import Any

from tests.helpers import ROOT

PARIS = "--prompt=What is the capital of France?"
PARIS_ANSWER = "The capital of France is Paris.\n"


def run_py(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    """Run `python run.py` in the checkout; stdout and stderr are captured, as text."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, ROOT / "run.py", *arguments], **options)
