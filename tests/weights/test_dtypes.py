"""The dtype that a model runs in."""

import logging
import types

import pytest

from llama_jax import InputError
from llama_jax.weights import dtypes


def test_a_tpu_runs_a_float16_checkpoint_in_bfloat16_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dtypes, "default_device", lambda: types.SimpleNamespace(platform="tpu"))
    with caplog.at_level(logging.WARNING):
        assert dtypes.choose_dtype(None, "float16") == "bfloat16"
    assert "the checkpoint is float16, which a TPU cannot multiply: running in" in caplog.text
    with pytest.raises(InputError, match="a TPU cannot multiply; use bfloat16"):
        dtypes.choose_dtype("float16", "float32")
    assert dtypes.choose_dtype("float32", "float16") == "float32"
