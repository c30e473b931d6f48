"""The recorded runs of the selftest find a constant that is changed by hand.

That it passes is shown from the wheel, in tests/test_packaging.py.
"""

import jax.numpy as jnp
import pytest

from llama_jax import Llama
from llama_jax.decode import sampling
from llama_jax.demo import DEMO_CHECKPOINT, SELFTEST
from llama_jax.nn import ops, transformer
from llama_jax.receipt import read_receipts
from llama_jax.replay import replay

FEW = slice(14, 16)
"""Of the recorded runs: two that are drawn at a high temperature."""


def other_noise(monkeypatch):
    uniform = sampling._open_unit
    monkeypatch.setattr(sampling, "_open_unit", lambda bits: uniform(bits) * jnp.float32(0.999))


def other_frequencies(monkeypatch):
    angles = ops.rope_angles
    monkeypatch.setattr(ops, "rope_angles", lambda p, size, theta, f: angles(p, size, 10_001.0, f))


def other_eps(monkeypatch):
    def normed(self, x, weight):
        return ops.NORM_IMPLEMENTATIONS[self.kernels.norm](x, weight, 2e-5)

    monkeypatch.setattr(transformer._Layer, "normed", normed)


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_noise, other_frequencies, other_eps])
def test_a_constant_that_was_changed_is_found(change, monkeypatch):
    change(monkeypatch)
    receipts = list(read_receipts(SELFTEST))[FEW]
    verdicts = list(replay(Llama.load(DEMO_CHECKPOINT), receipts, prefill=True))
    assert all(verdict.outcome.status == 1 for verdict in verdicts), list(map(str, verdicts))
