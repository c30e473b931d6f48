"""Kernels that cannot be used are done without, and say why; wrong calls are refused."""

import ctypes
import importlib.machinery
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.nn import cpu_kernels, missing_kernels, ops
from tests.helpers import ROOT


@pytest.fixture
def anew(native_kernels, monkeypatch):
    """Look for the kernels again, after what the test has changed."""
    cpu_kernels._register.cache_clear()
    cpu_kernels.has_kernels.cache_clear()
    yield
    monkeypatch.undo()
    cpu_kernels._register.cache_clear()
    cpu_kernels.has_kernels.cache_clear()


def test_library_that_does_not_load_is_reported_and_not_used(anew, monkeypatch, caplog, tmp_path):
    junk = tmp_path / "junk.so"
    junk.write_text("not a library")
    monkeypatch.setattr(
        cpu_kernels.importlib.util,
        "find_spec",
        lambda name: importlib.machinery.ModuleSpec(name, None, origin=str(junk)),
    )
    with caplog.at_level(logging.WARNING):
        assert not cpu_kernels.has_kernels()
    [line] = caplog.messages
    assert line.startswith("the CPU kernels cannot be used (amx: ")
    assert line.endswith(missing_kernels.remedy())


def test_library_of_another_version_is_reported_and_not_used(anew, monkeypatch, caplog):
    built = cpu_kernels.INTERFACE
    monkeypatch.setattr(cpu_kernels, "INTERFACE", 999)
    with caplog.at_level(logging.WARNING):
        assert not cpu_kernels.has_kernels()
    assert f"interface {built}, expected 999" in caplog.text


def test_missing_library_is_reported_once(anew, monkeypatch, caplog):
    monkeypatch.setattr(cpu_kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(missing_kernels, "explain_absence", lambda: "the reason")
    with caplog.at_level(logging.WARNING):
        assert not cpu_kernels.has_kernels()
        assert not cpu_kernels.has_kernels()
    assert caplog.messages == ["the reason"]


def test_cpu_without_the_instructions_is_reported_once(anew, monkeypatch, caplog):
    monkeypatch.setattr(cpu_kernels, "_load", lambda name, path: "")
    with caplog.at_level(logging.WARNING):
        assert not cpu_kernels.has_kernels()
        assert not cpu_kernels.has_kernels()
    [line] = caplog.messages
    assert line.startswith("the CPU kernels are for x86-64 CPUs with AVX2, which this one lacks")


def test_broken_library_is_reported_where_a_lesser_one_is_used(anew, monkeypatch, caplog):
    find = cpu_kernels.importlib.util.find_spec
    built = [
        name
        for name in cpu_kernels.INSTRUCTION_SETS
        if find(f"llama_jax.nn._cpu_kernels_{name}") is not None
    ]
    if len(built) == 1:
        pytest.skip("needs two sets to compare, and this kind of CPU has one")
    load, best = cpu_kernels._load, built[0]

    def broken(name, path):
        return "it is broken" if name == best else load(name, path)

    monkeypatch.setattr(cpu_kernels, "_load", broken)
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels.has_kernels()
    assert f"({best}: it is broken)" in caplog.text


def skip_unless_it_runs(name):
    """Skip a test of an instruction set whose library was not built, or that this CPU lacks."""
    spec = cpu_kernels.importlib.util.find_spec(f"llama_jax.nn._cpu_kernels_{name}")
    if spec is None or ctypes.CDLL(spec.origin).LlamaJaxInterface() == 0:
        pytest.skip(f"the kernels for {name} were not built, or this CPU lacks its instructions")


@pytest.mark.parametrize("name", cpu_kernels.INSTRUCTION_SETS)
def test_every_instruction_set_computes(anew, monkeypatch, name):
    """The libraries that this CPU runs, though the best one is taken."""
    skip_unless_it_runs(name)
    monkeypatch.setattr(cpu_kernels, "INSTRUCTION_SETS", (name,))
    assert cpu_kernels.has_kernels()
    rng = np.random.default_rng(0)
    for dtype, atol in (("float32", 1e-4), ("float16", 1e-4), ("bfloat16", 1e-4)):
        x = jnp.asarray(rng.normal(size=(9, 2100)), dtype).astype(jnp.float32)
        weight = jnp.asarray(rng.normal(size=(70, 2100)), dtype)
        (y,) = cpu_kernels.linears(x, weight)
        exact = np.asarray(x, np.float64) @ np.asarray(weight.astype(jnp.float32), np.float64).T
        np.testing.assert_allclose(y, exact, atol=atol)
        np.testing.assert_array_equal(cpu_kernels.linears(x[4:5], weight)[0][0], y[4])
        normed = cpu_kernels.rms_norm(x[None], weight[0], 1e-5)[0]
        np.testing.assert_allclose(normed, ops.rms_norm(x[None], weight[0], 1e-5)[0], rtol=1e-5)
        q = jnp.asarray(rng.normal(size=(1, 7, 6, 40)), jnp.float32)
        rotation = ops.make_rotation(jnp.asarray(rng.normal(size=(1, 7, 20)), jnp.float32))
        (turned,) = cpu_kernels.apply_rope(*rotation, q)
        np.testing.assert_allclose(turned, ops.apply_rope(*rotation, q)[0], atol=1e-6)
        k, v = (jnp.asarray(rng.normal(size=(1, 2, 99, 40)), dtype) for _ in range(2))
        positions = 80 + jnp.arange(7, dtype=jnp.int32)[None]
        out = cpu_kernels.attention(q, k, v, positions, attend_len=99)
        wide = [jnp.repeat(jnp.swapaxes(a, 1, 2), 3, axis=2).astype(jnp.float32) for a in (k, v)]
        seen = (jnp.arange(99)[None, :] <= positions[0][:, None])[None, None]
        expected = jax.nn.dot_product_attention(q, *wide, mask=seen)
        np.testing.assert_allclose(out, expected, atol=1e-5 if dtype != "bfloat16" else 2e-2)


def in_amx_order(x, weight):
    """Multiply as Intel defines TDPBF16PS: even and odd terms of 32 apart, each fused."""
    sums = np.zeros((x.shape[0], weight.shape[0]), np.float32)
    for step in range(0, x.shape[1], 32):
        parts = np.zeros((2, *sums.shape), np.float32)
        for i in range(step, min(step + 32, x.shape[1])):
            product = np.multiply.outer(x[:, i], weight[:, i]).astype(np.float64)  # exact
            parts[i % 2] = (parts[i % 2] + product).astype(np.float32)
        sums += parts[0] + parts[1]
    return sums


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 50])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (31, 16), (32, 17), (172, 130), (650, 33)])
def test_amx_adds_up_in_one_order(native_kernels, rows, inputs, outputs):
    if cpu_kernels.instruction_set() != "amx":
        pytest.skip("the order of AMX's tiles is that of a CPU with AMX, and of Linux 5.16")
    rng = np.random.default_rng(rows * inputs * outputs)
    x, weight = (
        np.asarray(jnp.asarray(rng.normal(size=size), jnp.bfloat16), np.float32)
        for size in ((rows, inputs), (outputs, inputs))
    )
    (y,) = cpu_kernels.linears(jnp.asarray(x), jnp.asarray(weight, jnp.bfloat16))
    np.testing.assert_array_equal(y, in_amx_order(x, weight))


GUARDED = """
import ctypes, mmap, sys
import jax, numpy as np
from llama_jax.nn import cpu_kernels

cpu_kernels.INSTRUCTION_SETS = sys.argv[1:]
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
for outputs, inputs in (2, 32), (34, 48), (50, 32), (130, 96), (34, 576):
    for dtype in ("float32", "float16", jax.numpy.bfloat16):
        size = outputs * inputs * np.dtype(dtype).itemsize
        room = mmap.mmap(-1, (size // page + 2) * page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(room))
        guard = begin + (size // page + 1) * page
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
        weight = np.frombuffer(room, dtype, outputs * inputs, guard - begin - size)
        array = jax.device_put(weight.reshape(outputs, inputs), may_alias=True)
        assert array.unsafe_buffer_pointer() + size == guard
        for rows in (1, 20, 40):
            x = jax.numpy.ones((rows, inputs))
            assert (cpu_kernels.linears(x, array)[0] == 0).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
@pytest.mark.parametrize("name", cpu_kernels.INSTRUCTION_SETS)
def test_nothing_beyond_the_weights_is_read(native_kernels, name):
    """Behind them is a page that may not be read: whoever does is killed."""
    skip_unless_it_runs(name)
    command = [sys.executable, "-c", GUARDED, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def attend(q=(1, 1, 2, 8), k=(1, 2, 4, 8), v=(1, 2, 4, 8), position=0, row=0, v_dtype="float32"):
    """Call past the checks of shapes in Python."""
    return cpu_kernels._call(
        "Attention",
        jax.ShapeDtypeStruct(q, jnp.float32),
        jnp.ones(q),
        jnp.ones(k),
        jnp.ones(v, v_dtype),
        jnp.full(q[:2], position, jnp.int32),
        jnp.full(q[:1], row, jnp.int32),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": (1, 2, 4, 9)},
        {"v": (1, 1, 1, 8)},
        {"v_dtype": "float16"},
        {"k": (1, 3, 4, 8), "v": (1, 3, 4, 8)},
        {"k": (1, 0, 4, 8), "v": (1, 0, 4, 8)},
        {"k": (1, 2, 0, 8), "v": (1, 2, 0, 8)},
    ],
    ids=str,
)
def test_attention_of_wrong_shapes_is_refused(native_kernels, wrong):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected q \[B, T, N, H\]"):
        attend(**wrong)


@pytest.mark.parametrize("position", [-(2**30), -1, 4, 2**31 - 1])
@pytest.mark.parametrize("row", [-5, 0, 50_000_000])
def test_positions_and_rows_out_of_range_are_clamped(native_kernels, position, row):
    np.testing.assert_allclose(attend(position=position, row=row), 1.0, rtol=1e-6)


@pytest.mark.parametrize("half", [1, 3, 16, 37])
def test_rope_turns_pairs_as_complex_numbers(native_kernels, half):
    """Queries and keys at once; a position's bits are the same alone."""
    rng = np.random.default_rng(half)
    angles = rng.normal(size=(2, 9, half)) * 100
    cos, sin = (jnp.asarray(turn(angles), jnp.float32) for turn in (np.cos, np.sin))
    xs = [jnp.asarray(rng.normal(size=(2, 9, heads, 2 * half)), jnp.float32) for heads in (4, 1)]
    ys = cpu_kernels.apply_rope(cos, sin, *xs)
    turns = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    for x, y in zip(xs, ys, strict=True):
        wide = np.asarray(x, np.float64)
        turned = (wide[..., :half] + 1j * wide[..., half:]) * turns[:, :, None]
        exact = np.concatenate([turned.real, turned.imag], axis=-1)
        np.testing.assert_allclose(y, exact, atol=1e-6)
        (alone,) = cpu_kernels.apply_rope(cos[1:, 5:6], sin[1:, 5:6], x[1:, 5:6])
        np.testing.assert_array_equal(alone[0, 0], y[1, 5])


@pytest.mark.parametrize(
    ("sin", "x"),
    [
        ((2, 3, 5), (2, 3, 1, 8)),
        ((2, 3, 4), (2, 3, 8)),
        ((2, 3, 4), (1, 3, 1, 8)),
        ((2, 3, 4), (2, 4, 1, 8)),
        ((2, 3, 4), (2, 3, 1, 9)),
    ],
)
def test_rope_of_wrong_shapes_is_refused(native_kernels, sin, x):
    out = jax.ShapeDtypeStruct(x, jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected .* \[B, T"):
        cpu_kernels._call("Rope", [out], jnp.ones((2, 3, 4)), jnp.ones(sin), jnp.ones(x))


def test_nan_is_not_hidden_and_infinity_stays_where_it_is(native_kernels):
    q = jnp.ones((1, 6, 2, 8))
    k = v = jnp.ones((1, 2, 16, 8))
    positions = jnp.arange(4, 10, dtype=jnp.int32)[None]
    out = cpu_kernels.attention(q, k.at[:, :, 6].set(jnp.nan), v, positions, attend_len=16)
    assert np.isfinite(out[:, :2]).all()
    assert np.isnan(out[:, 2:]).all()
    out = cpu_kernels.attention(q, k, v.at[:, :, 6].set(jnp.inf), positions, attend_len=16)
    assert np.isfinite(out[:, :2]).all()
    assert np.isposinf(out[:, 2:]).all()


def test_no_rows(native_kernels):
    assert cpu_kernels.linears(jnp.ones((0, 4)), jnp.ones((3, 4)))[0].shape == (0, 3)
