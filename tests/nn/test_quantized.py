"""Products with int8 weights: against float64, the bits that are promised, and no widened copy."""

import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.programs import compile_decode
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import choose_plan
from llama_jax.nn import cpu_kernels, projection
from llama_jax.nn.kernel_choice import KernelChoice
from llama_jax.nn.shapes import SCALE
from llama_jax.weights.shards import by_path, nest
from tests.helpers.models import CONFIG, NATIVE, SMALL
from tests.helpers.quantization import draw_quantized, product, quantized, quantized_params

SIZES = [(1, 1), (1030, 130), (7, 3000), (2100, 9)]


@pytest.fixture(params=projection.IMPLEMENTATIONS)
def multiply(request):
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return lambda x, *weights: projection.IMPLEMENTATIONS[request.param](x, *weights)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_equals_the_float64_oracle(multiply, inputs, outputs, dtype):
    """With x rounded to the run's dtype beforehand, so that rounding explains no difference."""
    x, weight = draw_quantized(inputs, outputs, dtype)
    x = x.astype(dtype).astype(jnp.float32)
    for rows in (1, 2, 30):
        (got,) = multiply(x[:rows], weight)
        assert got.dtype == jnp.float32
        exact, size = product(x[:rows], weight)
        assert (np.abs(np.asarray(got) - exact) <= 4e-7 * size).all()


def test_keeps_leading_axes(multiply):
    x, weight = draw_quantized(32, 8, "float32", rows=6)
    (got,) = multiply(x.reshape(2, 3, 32), weight)
    np.testing.assert_allclose(got, product(x, weight)[0].reshape(2, 3, 8), rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_gives_zeros(multiply):
    x, weight = draw_quantized(64, 8)
    values, scale = weight.values.at[3].set(0), weight.scale.at[3].set(0)
    (got,) = multiply(x, dataclasses.replace(weight, values=values, scale=scale))
    assert not np.asarray(got[:, 3]).any()


@pytest.mark.parametrize("name", ["native", "blocked"])
def test_activations_beyond_float16(name, request):
    """On a CPU they are float32, whatever the run's dtype."""
    if name == "native":
        request.getfixturevalue("native_kernels")
    x, weight = draw_quantized(64, 8, "float16", rows=2)
    assert not projection.rounds_to_float16(name, weight)
    (got,) = projection.IMPLEMENTATIONS[name](x * 1e6, weight)
    exact, size = product(x * 1e6, weight)
    assert (np.abs(np.asarray(got) - exact) <= 4e-7 * size).all()


def test_the_plain_product_rounds_to_the_runs_dtype():
    _, weight = draw_quantized(64, 8, "float16")
    assert projection.rounds_to_float16("plain", weight)
    assert not projection.rounds_to_float16("plain", dataclasses.replace(weight, dtype=jnp.float32))


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_native_bits_do_not_depend_on_the_batch(native_kernels, inputs, outputs):
    x, weight = draw_quantized(inputs, outputs)
    alone = np.concatenate([cpu_kernels.linears(x[i : i + 1], weight)[0] for i in range(len(x))])
    for rows in (2, 3, 4, 5, 6, 7, 13, 30):
        np.testing.assert_array_equal(cpu_kernels.linears(x[:rows], weight)[0], alone[:rows])


def test_native_adds_as_it_does_for_float16(native_kernels):
    """The same order: with scales of one, and numbers that float16 has, the same bits."""
    x, weight = draw_quantized(2100, 70)
    ones = dataclasses.replace(weight, scale=jnp.ones_like(weight.scale))
    (half,) = cpu_kernels.linears(x, weight.values.astype(jnp.float16))
    np.testing.assert_array_equal(cpu_kernels.linears(x, ones)[0], half)
    np.testing.assert_array_equal(cpu_kernels.linears(x, weight)[0], half * weight.scale[None, :])


def test_several_weights_in_one_call_of_the_kernel(native_kernels):
    """The same bits as one by one, in the order asked for."""
    x, whole = draw_quantized(70, 290)
    parts = [
        dataclasses.replace(whole, values=whole.values[rows], scale=whole.scale[rows])
        for rows in (slice(64), slice(64, 65), slice(65, None))
    ]
    for y, part in zip(cpu_kernels.linears(x, *parts), parts, strict=True):
        np.testing.assert_array_equal(y, cpu_kernels.linears(x, part)[0])


def test_wrong_calls_are_refused(native_kernels):
    x, weight = draw_quantized(5, 3, rows=2)
    out = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    call = jax.ffi.ffi_call(f"llama_jax_Linear_{cpu_kernels._register()}", [out])
    with pytest.raises(jax.errors.JaxRuntimeError, match="as many results as weights"):
        call(x, weight.values)
    for wrong in (weight.scale[:2], weight.scale.astype(jnp.float16), weight.values[:, 0]):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected float32 scales \[O\]"):
            call(x, weight.values, wrong)
    both = jax.ffi.ffi_call(f"llama_jax_Linear_{cpu_kernels._register()}", [out, out])
    with pytest.raises(jax.errors.JaxRuntimeError, match="of one dtype"):
        both(x, weight.values, weight.values.astype(jnp.float32), weight.scale, weight.scale)


def _products(name, monkeypatch):
    """Return products by one library's kernels; None: this CPU does not run them."""
    spec = cpu_kernels.importlib.util.find_spec(f"llama_jax.nn._cpu_kernels_{name}")
    if spec is None or ctypes.CDLL(spec.origin).LlamaJaxInterface() == 0:
        return None
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "_register", lambda: name)
        assert cpu_kernels._load(name, spec.origin) is None
        draws = [draw_quantized(*size) for size in SIZES]
        return [np.asarray(cpu_kernels.linears(*drawn)[0]) for drawn in draws]


def test_instruction_sets_of_one_width_have_the_same_bits(native_kernels, monkeypatch):
    """As with float16; AVX2 has half as many lanes, and so another order."""
    found = {name: _products(name, monkeypatch) for name in cpu_kernels.INSTRUCTION_SETS}
    exact = [product(*draw_quantized(*size)) for size in SIZES]
    for products in filter(None, found.values()):
        for got, (right, size) in zip(products, exact, strict=True):
            assert (np.abs(got - right) <= 4e-7 * size).all()
    wide = [found[name] for name in ("avx512", "avx512bf16", "amx") if found[name] is not None]
    if len(wide) < 2:
        pytest.skip("this CPU runs one of them at most")
    for products in zip(*wide, strict=True):
        for other in products[1:]:
            np.testing.assert_array_equal(other, products[0])


WIDE = dataclasses.replace(
    quantized(SMALL), vocab_size=300, dim=512, ffn_dim=2048, num_heads=8, num_kv_heads=4
)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_weight_is_widened_as_a_whole(monkeypatch, request, native, dtype):
    """By the bytes of a decode step's temporary arrays."""
    if native:
        request.getfixturevalue("native_kernels")
    monkeypatch.setattr("llama_jax.decode.plan.has_kernels", lambda: native)
    plan = choose_plan(WIDE, dtype)
    assert plan.kernels.projection == ("native" if native else "blocked")
    memory = compile_decode(WIDE, plan, 64, 64).memory_analysis()
    assert memory is not None
    # Without kernels some blocks in float32. In 16 bits the largest projection would have 2 MB.
    assert memory.temp_size_in_bytes < (100_000 if native else 2_500_000)


@pytest.mark.parametrize("plan", [NATIVE, NATIVE._replace(kernels=KernelChoice("blocked"))])
def test_a_quantized_model_computes_what_its_widened_weights_do(native_kernels, plan):
    """In float32, whose rounding alone explains what is left."""
    config, params = quantized(CONFIG), quantized_params(CONFIG)
    leaves = by_path(params)
    wide = nest(
        {
            path: array.astype(jnp.float32) * leaves[path + SCALE][:, None]
            if path + SCALE in leaves
            else array
            for path, array in leaves.items()
            if not path.endswith(SCALE)
        }
    )
    text = np.random.default_rng(1).integers(3, CONFIG.vocab_size, 40).tolist()
    one = Executor(config, params, "float32", context=64, plan=plan)
    other = Executor(CONFIG, wide, "float32", context=64, plan=NATIVE)
    assert one.params["layer_0"]["attention"]["q"].dtype == jnp.int8
    np.testing.assert_allclose(one.logits(text), other.logits(text), atol=2e-5, rtol=1e-5)
