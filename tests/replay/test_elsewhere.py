"""Replays between machines whose numbers differ by rounding: the same tokens, or a tie."""

import math
import subprocess
import sys

import pytest

from llama_jax.engine.draw import Draw
from llama_jax.replay.check import Checked
from llama_jax.replay.judge import Judgement, Tolerance, judge
from tests.helpers import ROOT


def test_a_runner_up_that_one_side_alone_cuts_is_rounding():
    """As top-p had it in bfloat16, with the CPU kernels and without them."""
    allowed = Tolerance(0.32, 0.64, 0.64)
    recorded = Draw(305, -0.742, math.inf, math.inf, 0.0018, math.inf)
    here = Draw(305, -0.756, 3.45, math.inf, 0.0063, math.inf)
    assert judge([recorded] * 3, [Checked(here, 0.0)] * 3, allowed) is None
    far = [draw._replace(top_p_margin=0.7) for draw in (recorded, here)]
    found = judge([far[0]] * 3, [Checked(far[1], 0.0)] * 3, allowed)
    assert found is Judgement.ANOTHER_SAMPLER


@pytest.mark.exhaustive
def test_without_the_kernels_the_tokens_are_the_same_or_a_tie():
    command = [sys.executable, "-m", "tools.replay_elsewhere", "--dtypes=float16", "--requests=24"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2
