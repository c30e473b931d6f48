"""Each implementation of products with weights: against float64, and the bits it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.nn import cpu_kernels, projection

SIZES = [
    *[(1, 1), (1030, 130), (7, 3000)],
    *[
        pytest.param(*size, marks=pytest.mark.exhaustive)
        for size in [(5, 3), (16, 4), (33, 7), (64, 64), (1024, 65), (2100, 9)]
    ],
]


def implementations(*names):
    @pytest.fixture(params=names)
    def implementation(request):
        if request.param == "native":
            request.getfixturevalue("native_kernels")
        return lambda x, weight: projection.IMPLEMENTATIONS[request.param](x, weight)[0]

    return implementation


any_implementation = implementations(*projection.IMPLEMENTATIONS)
implementation_of_16_bits = implementations("native", "blocked")


def draw(inputs, outputs, dtype, rows=30):
    rng = np.random.default_rng(inputs)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(outputs, inputs)), jnp.float32).astype(dtype)


def oracle(x, weight):
    x, weight = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, weight))
    return x @ weight.T


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_equals_the_float64_oracle(any_implementation, inputs, outputs, dtype):
    """With x rounded to the weight's dtype beforehand, so that rounding explains no difference."""
    x, weight = draw(inputs, outputs, dtype)
    x = x.astype(dtype).astype(jnp.float32)
    for rows in (1, 2, 30):
        got = any_implementation(x[:rows], weight)
        assert got.dtype == jnp.float32
        atol = 6e-6 * inputs**0.5  # 4.5e-6 was seen on a GPU
        np.testing.assert_allclose(got, oracle(x[:rows], weight), atol=atol)


def test_keeps_leading_axes(any_implementation):
    x, weight = draw(32, 8, "float32", rows=6)
    got = any_implementation(x.reshape(2, 3, 32), weight)
    np.testing.assert_allclose(got, oracle(x, weight).reshape(2, 3, 8), atol=1e-5)


def test_float16_inputs_beyond_its_range(implementation_of_16_bits):
    """Where nothing is rounded to float16, nothing can overflow it."""
    x, weight = draw(64, 8, "float16", rows=1)
    x = x * 1e6
    np.testing.assert_allclose(
        implementation_of_16_bits(x, weight), oracle(x, weight), rtol=1e-4, atol=30
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_native_bits_do_not_depend_on_the_batch(native_kernels, inputs, outputs, dtype):
    x, weight = draw(inputs, outputs, dtype, rows=40)
    alone = np.concatenate([cpu_kernels.linears(x[i : i + 1], weight)[0] for i in range(len(x))])
    for rows in (2, 3, 4, 5, 6, 7, 13, 30, 33, 40):
        np.testing.assert_array_equal(cpu_kernels.linears(x[:rows], weight)[0], alone[:rows])


def test_native_rounds_to_bfloat16_as_jax_does(native_kernels):
    """Halfway cases, infinities, NaN, subnormals: through a weight of ones and one input."""
    bits = np.concatenate([np.arange(0, 2**32, 65521, np.uint64), [0x3F808000, 0x3F818000]])
    x = bits.astype(np.uint32).view(np.float32)
    x = jnp.asarray(x[~(np.abs(x) < 2.0**-126)][:, None])  # AVX-512 takes subnormals for 0
    (got,) = cpu_kernels.linears(x, jnp.ones((1, 1), jnp.bfloat16))
    np.testing.assert_array_equal(got, x.astype(jnp.bfloat16).astype(jnp.float32))


def test_wrong_shapes_are_refused(native_kernels):
    out = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    name = f"llama_jax_Linear_{cpu_kernels._register()}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected x \[T, K\]"):
        jax.ffi.ffi_call(name, [out])(jnp.ones((2, 5)), jnp.ones((3, 4)))
    weights = jnp.ones((3, 5)), jnp.ones((3, 5), jnp.float16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of one dtype"):
        jax.ffi.ffi_call(name, [out, out])(jnp.ones((2, 5)), *weights)
    with pytest.raises(jax.errors.JaxRuntimeError, match="as many results as weights"):
        jax.ffi.ffi_call(name, [out, out])(jnp.ones((2, 5)), jnp.ones((3, 5)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_several_weights_in_one_call_of_the_kernel(native_kernels, dtype):
    """The same bits as one by one, in the order asked for."""
    x, weight = draw(70, 290, dtype)
    parts = weight[:64], weight[64:65], weight[65:]
    for y, part in zip(cpu_kernels.linears(x, *parts), parts, strict=True):
        np.testing.assert_array_equal(y, cpu_kernels.linears(x, part)[0])
