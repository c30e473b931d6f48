"""Files with fields that are missing, mistyped, negative, huge or that lead elsewhere."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.parametrize(
    "count",
    [
        200,
        pytest.param(20_000, marks=[pytest.mark.exhaustive, pytest.mark.long]),
    ],
)
def test_hostile_fields_are_one_line_in_time_and_within_memory(count):
    """Of manifests, configs, indexes and headers; or what is read is right."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hostile_cases", str(count)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count(": held") == 5
