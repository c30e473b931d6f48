"""Arrays are stored in chunks that each lie in one device's part, and read as before."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tensorstore

from llama_jax.nn.shapes import shapes_by_path
from llama_jax.nn.sharding import choose_shards, param_spec, split_axis
from llama_jax.weights import chunks
from llama_jax.weights.checkpoint import (
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    verify_checkpoint,
)
from llama_jax.weights.chunks import CHUNK_BYTES, chunk_shape
from llama_jax.weights.shards import by_path, tensors
from tests.helpers.models import SMALL, random_params

WIDE = dataclasses.replace(SMALL, vocab_size=96, dim=64, ffn_dim=176, num_heads=8, num_kv_heads=8)
SHAPES = {
    "mha": WIDE,
    "gqa": dataclasses.replace(WIDE, num_kv_heads=2),
    "odd vocabulary": dataclasses.replace(WIDE, vocab_size=97),
    "tied": dataclasses.replace(WIDE, tie_embeddings=True),
}
LLAMA_2 = {
    "7b": dataclasses.replace(
        WIDE, vocab_size=32000, dim=4096, ffn_dim=11008, num_heads=32, num_kv_heads=32
    ),
    "13b": dataclasses.replace(
        WIDE, vocab_size=32000, dim=5120, ffn_dim=13824, num_heads=40, num_kv_heads=40
    ),
    "70b": dataclasses.replace(
        WIDE, vocab_size=32000, dim=8192, ffn_dim=28672, num_heads=64, num_kv_heads=8
    ),
}


def part_shape(path, shape, config, devices):
    """Return the shape of a device's part of a parameter."""
    shards = choose_shards(config, devices)
    parts = {None: 1, "kv": shards.kv, ("kv", "group"): shards.devices}
    spec = tuple(param_spec(path, config, shards))
    spec += (None,) * (len(shape) - len(spec))
    return tuple(size // parts[axis] for size, axis in zip(shape, spec, strict=True))


def crosses_parts(chunk, shape, part):
    """Return whether any chunk lies in more than one part."""
    split = [axis for axis in range(len(shape)) if part[axis] < shape[axis]]
    return any(part[axis] % chunk[axis] for axis in split)


@pytest.mark.parametrize(
    ("model", "devices"),
    [("7b", (2, 4, 8, 16, 32)), ("13b", (2, 4, 8)), ("70b", (2, 4, 8, 16, 32, 64))],
)
def test_chunks_of_llama_2_lie_in_one_devices_part(model, devices):
    config = LLAMA_2[model]
    for path, shape in shapes_by_path(config).items():
        chunk = chunk_shape(shape, 2, split_axis(path, config))
        # A vocabulary of 32,000 is halved 8 times, to an odd number.
        assert CHUNK_BYTES / 4 < 2 * math.prod(chunk) < 2 * CHUNK_BYTES or chunk == shape, path
        for count in devices:
            assert not crosses_parts(chunk, shape, part_shape(path, shape, config, count)), path


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(chunks, "_MIN_COLUMNS", 8)


def stored_chunks(folder):
    """Return the chunk shape of each array, by path, as its own metadata has it."""
    rows = json.loads((folder / "manifest.json").read_text())["tensors"]
    found = {}
    for path, row in rows.items():
        base = f"file://{folder}/params/{row['shard']}/"
        store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        found[path] = array.chunk_layout.write_chunk.shape
        assert found[path] == array.chunk_layout.read_chunk.shape
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_a_written_checkpoint_has_no_chunk_in_two_parts(small_chunks, tmp_path, name):
    config = SHAPES[name]
    save_checkpoint(tmp_path / "saved", tensors(random_params(config)), config)
    found = stored_chunks(tmp_path / "saved")
    shapes = shapes_by_path(config)
    assert found.keys() == shapes.keys()
    for path, chunk in found.items():
        for count in (2, 4, 8):
            part = part_shape(path, shapes[path], config, count)
            assert not crosses_parts(chunk, shapes[path], part), (path, count)
    cut = {path for path in found if found[path] != shapes[path]}
    split = {path for path in shapes if part_shape(path, shapes[path], config, 8) != shapes[path]}
    assert cut >= split
    assert ("embed" in cut) != config.tie_embeddings


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_change_neither_arrays_nor_digests(small_chunks, monkeypatch, tmp_path, name):
    config = SHAPES[name]
    params = random_params(config)
    save_checkpoint(tmp_path / "cut", tensors(params), config)
    monkeypatch.setattr(chunks, "chunk_shape", lambda shape, itemsize, axis: shape)
    save_checkpoint(tmp_path / "whole", tensors(params), config)  # as earlier versions wrote it
    assert stored_chunks(tmp_path / "whole") == shapes_by_path(config)
    assert stored_chunks(tmp_path / "cut") != shapes_by_path(config)
    assert verify_checkpoint(tmp_path / "cut") == verify_checkpoint(tmp_path / "whole")
    for folder in ("cut", "whole"):
        loaded = load_checkpoint(tmp_path / folder)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
        read = {tensor.path: tensor.array for tensor in read_tensors(tmp_path / folder)}
        jax.tree.map(np.testing.assert_array_equal, read, by_path(params))
