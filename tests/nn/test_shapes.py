import dataclasses

import pytest

from llama_jax.nn.shapes import num_arrays, shapes_by_path
from llama_jax.nn.transformer import param_shapes
from llama_jax.weights.shards import by_path
from tests.helpers.models import SMALL


@pytest.mark.parametrize("tied", [False, True])
def test_the_shapes_are_those_of_the_model(tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    expected = {path: leaf.shape for path, leaf in by_path(param_shapes(config)).items()}
    assert shapes_by_path(config) == expected
    assert num_arrays(config) == len(expected)
