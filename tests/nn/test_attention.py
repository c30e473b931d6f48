"""Each implementation of attention against float64, and the bits that may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.nn import attention
from llama_jax.nn.ops import as_float

FLOATS = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.fixture(params=["blocks", "loop", "tree", "whole", "native"])
def implementation(request):
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    dtype = request.node.callspec.params.get("dtype")
    if request.param == "tree" and dtype == "bfloat16" and jax.default_backend() == "cpu":
        pytest.skip("XLA has no such product of bfloat16 for CPUs")
    return jax.jit(attention.IMPLEMENTATIONS[request.param], static_argnames="attend_len")


@pytest.fixture(params=["blocks", "loop", "native"])
def exact_implementation(request):
    """Those that keep their bits on a CPU, where blocks of a tree are multiplied variously."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return jax.jit(attention.IMPLEMENTATIONS[request.param], static_argnames="attend_len")


def draw(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def oracle(q, k, v, positions, rows):
    """Every query by itself in float64, over the slots it sees."""
    q, k, v = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, k, v))
    group = q.shape[2] // k.shape[1]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = int(positions[b, t]) + 1
        keys, values = k[rows[b], n // group, :seen], v[rows[b], n // group, :seen]
        scores = keys @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values / weights.sum()
    return out


SHAPES = (
    (2, 7, 4, 1, 8),
    (1, 20, 8, 2, 128),
    (1, 5, 3, 3, 100),
    (1, 1, 4, 4, 64),
    (3, 1, 6, 2, 16),
)
"""The first in every dtype, the next two in float32."""


@pytest.mark.parametrize(
    ("dtype", "batch", "length", "heads", "kv_heads", "width"),
    [
        pytest.param(
            dtype,
            *shape,
            marks=[pytest.mark.exhaustive]
            * (shape not in (SHAPES[:3] if dtype == "float32" else SHAPES[:1])),
        )
        for dtype in FLOATS
        for shape in SHAPES
    ],
)
def test_equals_the_float64_oracle(implementation, dtype, batch, length, heads, kv_heads, width):
    q = draw((batch, length, heads, width))
    k, v = (draw((batch, kv_heads, 256, width), dtype, seed) for seed in (1, 2))
    starts = np.random.default_rng(3).integers(0, 256 - length, batch)
    positions = jnp.asarray(starts[:, None] + np.arange(length), jnp.int32)
    got = implementation(q, k, v, positions, attend_len=256)
    expected = oracle(q, k, v, positions, range(batch))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE[dtype])


def test_reads_the_given_slot(implementation):
    q = draw((1, 3, 4, 32))
    k, v = (draw((3, 2, 256, 32), seed=seed) for seed in (1, 2))
    positions = jnp.asarray([[9, 10, 11]], jnp.int32)
    got = implementation(q, k, v, positions, slots=jnp.array([2], jnp.int32), attend_len=256)
    np.testing.assert_allclose(got, oracle(q, k, v, positions, [2]), atol=2e-6)


def test_scores_of_any_size_stay_finite(implementation):
    """Scores of 1e4, all but one far below the highest; and keys that are all the same."""
    q, v = draw((1, 1, 2, 16)) * 1e3, draw((1, 2, 256, 16), seed=2)
    positions = jnp.asarray([[255]], jnp.int32)
    for k in (draw((1, 2, 256, 16), seed=1) * 30, jnp.ones((1, 2, 256, 16))):
        got = implementation(q, k, v, positions, attend_len=256)
        np.testing.assert_allclose(got, oracle(q, k, v, positions, [0]), atol=2e-3)


def test_bits_of_bfloat16_are_bfloat16(implementation):
    q = draw((1, 2, 4, 32))
    k, v = (draw((1, 4, 256, 32), "bfloat16", seed) for seed in (1, 2))
    positions = jnp.asarray([[100, 101]], jnp.int32)
    bits = [jax.lax.bitcast_convert_type(a, jnp.uint16) for a in (k, v)]
    np.testing.assert_array_equal(as_float(bits[0]), k)
    from_bits = implementation(q, *bits, positions, attend_len=256)
    np.testing.assert_array_equal(from_bits, implementation(q, k, v, positions, attend_len=256))


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        *[("float32", 1), ("bfloat16", 16)],
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in (("float32", 16), ("bfloat16", 1), ("float16", 1), ("float16", 16))
        ),
    ],
)
@pytest.mark.parametrize(
    ("kv_heads", "group"), [pytest.param(8, 1, marks=pytest.mark.exhaustive), (2, 4)]
)
@pytest.mark.parametrize(
    "buckets", [(512, 4096), pytest.param((1024, 2048), marks=pytest.mark.exhaustive)]
)
def test_bits_do_not_depend_on_the_bucket(
    exact_implementation, dtype, kv_heads, group, length, buckets
):
    q = draw((1, length, kv_heads * group, 64))
    k, v = (draw((1, kv_heads, 4096, 64), dtype, seed) for seed in (1, 2))
    positions = 200 + jnp.arange(length, dtype=jnp.int32)[None, :]
    expected = exact_implementation(q, k, v, positions, attend_len=256)
    for bucket in buckets:
        got = exact_implementation(q, k, v, positions, attend_len=bucket)
        np.testing.assert_array_equal(got, expected)
        got = exact_implementation(
            q, k[:, :, :bucket], v[:, :, :bucket], positions, attend_len=bucket
        )
        np.testing.assert_array_equal(got, expected)
    garbage = k.at[:, :, 256:].set(7.0), v.at[:, :, 256:].set(7.0)
    got = exact_implementation(q, *garbage, positions, attend_len=4096)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_native_bits_do_not_depend_on_the_batch(native_kernels, dtype):
    """A query has the same bits in a prompt, alone, in any row, and in a cache of any size."""
    implementation = attention.IMPLEMENTATIONS["native"]
    q, k, v = draw((4, 21, 6, 48)), *(draw((4, 2, 200, 48), dtype, seed) for seed in (1, 2))
    positions = jnp.asarray(np.arange(4)[:, None] * 30 + np.arange(21), jnp.int32)
    whole = implementation(q, k, v, positions, attend_len=200)
    for b, t in ((0, 0), (1, 7), (3, 20)):
        alone = q[b : b + 1, t : t + 1], *(a[b : b + 1, :, :120] for a in (k, v))
        got = implementation(*alone, positions[b : b + 1, t : t + 1], attend_len=120)
        np.testing.assert_array_equal(got[0, 0], whole[b, t])
