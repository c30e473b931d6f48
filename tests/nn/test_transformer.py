import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.nn import cache as kv
from llama_jax.nn import ops, projection
from llama_jax.nn.transformer import Transformer, forward
from tests.helpers import reference
from tests.helpers.models import SMALL, random_params

TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, 32).tolist()
PERTURBED = {
    "vocab_size": 131,
    "dim": 48,
    "ffn_dim": 56,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 4,
    "norm_eps": 0.3,
    "rope_theta": 500.0,
    "tie_embeddings": True,
    "rope_factor": 2.5,
}
ALSO_IN_PARITY = ("vocab_size", "dim", "ffn_dim", "num_layers", "rope_theta")
"""Whose change tests/test_parity.py has too: left out by default."""
CASES = [
    pytest.param(SMALL, id="small"),
    *(
        pytest.param(
            dataclasses.replace(SMALL, **{name: value}),
            id=name,
            marks=[pytest.mark.slow] * (name in ALSO_IN_PARITY),
        )
        for name, value in PERTURBED.items()
    ),
]


jit_forward = jax.jit(forward, static_argnums=0, static_argnames="attend_len")


def full_forward(config, params, tokens, dtype=jnp.float32, attend_len=None):
    """Logits of one sequence at once, through a cache of its own."""
    attend_len = attend_len or len(tokens)
    cache = kv.init_cache(config, 1, attend_len, dtype)
    args = (jnp.asarray([tokens]), jnp.zeros(1, jnp.int32), cache)
    return jit_forward(Transformer(config, dtype), params, *args, attend_len=attend_len)[0][0]


def test_every_config_field_is_perturbed():
    fields = {field.name for field in dataclasses.fields(SMALL)}
    # Two limit, and compute nothing; tests/nn/test_quantized.py has the third.
    others = {"max_seq_len", "eos_tokens", "quantization"}
    assert PERTURBED.keys() | others == fields


@pytest.mark.parametrize("config", CASES)
def test_equals_the_float64_oracle(config):
    params = random_params(config)
    ours = full_forward(config, params, TOKENS)
    oracle = reference.logits(params, config, TOKENS)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, oracle, atol=2e-4, rtol=0)
    assert np.abs(oracle).max() > 1  # or the tolerance would mean little


@pytest.mark.parametrize("name", PERTURBED)
def test_every_config_field_changes_something(name):
    """Either the parameters' shapes, or, with the very same parameters, the logits."""
    changed = dataclasses.replace(SMALL, **{name: PERTURBED[name]})
    before = random_params(SMALL)
    if name not in ("norm_eps", "rope_theta", "rope_factor"):
        assert jax.tree.map(jnp.shape, before) != jax.tree.map(jnp.shape, random_params(changed))
    else:
        a, b = full_forward(SMALL, before, TOKENS), full_forward(changed, before, TOKENS)
        assert float(jnp.abs(a - b).max()) > 1e-2


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16])
def test_half_precision_is_close(dtype):
    """Bounds: twice what was measured (float16 0.0038, bfloat16 0.039 of the logits' spread)."""
    params = random_params(SMALL, dtype)
    oracle = reference.logits(params, SMALL, TOKENS)
    error = np.abs(np.asarray(full_forward(SMALL, params, TOKENS, dtype)) - oracle)
    assert error.max() / oracle.std() < {jnp.float16: 0.008, jnp.bfloat16: 0.08}[dtype]


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.float32,
        pytest.param(jnp.float16, marks=pytest.mark.exhaustive),
        pytest.param(jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_cached_equals_uncached_at_every_split(dtype):
    params, model = random_params(SMALL, dtype), Transformer(SMALL, dtype)
    tokens = TOKENS[:16]
    whole = full_forward(SMALL, params, tokens, dtype)

    def run(part, start, cache):
        padded = jnp.asarray([part + [0] * (16 - len(part))])
        start = jnp.full(1, start, jnp.int32)
        logits, cache = jit_forward(model, params, padded, start, cache, attend_len=32)
        return logits[0, : len(part)], cache

    for split in range(1, len(tokens)):
        first, cache = run(tokens[:split], 0, kv.init_cache(SMALL, 1, 32, dtype))
        second, _ = run(tokens[split:], split, cache)
        atol = 2e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(jnp.concatenate([first, second]), whole, atol=atol)


def test_padding_changes_no_bit():
    """Garbage to the right of the tokens, and in slots not yet written, is never seen."""
    params = random_params(SMALL)
    clean = kv.init_cache(SMALL, 1, 64, jnp.float32)
    dirty = jax.tree.map(lambda a: jnp.full_like(a, 1e4), clean)
    start = jnp.zeros(1, jnp.int32)
    outputs = []
    for cache, padding in ((clean, 0), (dirty, 96)):
        tokens = jnp.asarray([TOKENS[:10] + [padding] * 6])
        logits, _ = jit_forward(Transformer(SMALL), params, tokens, start, cache, attend_len=64)
        outputs.append(np.asarray(logits[0, :10]))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_logit_bits_do_not_depend_on_the_bucket(dtype):
    """A prompt's chunk, then one token: what prefill and decode compute."""
    params, model = random_params(SMALL, dtype), Transformer(SMALL, dtype)
    outputs = []
    for attend_len in (256, 512, 2048):
        cache = kv.init_cache(SMALL, 1, 2048, dtype)
        for start, tokens in ((0, TOKENS[:16]), (16, TOKENS[16:17])):
            starts = jnp.full(1, start, jnp.int32)
            args = (jnp.asarray([tokens]), starts, cache)
            logits, cache = jit_forward(model, params, *args, attend_len=attend_len)
            outputs.append(np.asarray(logits))
    for i, other in enumerate(outputs[2:]):
        np.testing.assert_array_equal(outputs[i % 2], other)


def test_one_row_of_many():
    """Prefill of one row leaves the others' slots alone and equals that row run by itself."""
    params = random_params(SMALL)
    cache = jax.tree.map(lambda a: a + 1, kv.init_cache(SMALL, 3, 16, jnp.float32))
    tokens, start = jnp.asarray([TOKENS[:8]]), jnp.full(1, 4, jnp.int32)
    args = (Transformer(SMALL), params, tokens, start)
    logits, after = jit_forward(*args, cache, slots=jnp.array([1], jnp.int32), attend_len=16)
    alone = jax.tree.map(lambda a: a[1:2], cache)
    expected, alone = jit_forward(*args, alone, attend_len=16)
    np.testing.assert_array_equal(logits, expected)
    for layer, lone, old in zip(after, alone, cache, strict=True):
        np.testing.assert_array_equal(layer.k[1], lone.k[0])
        np.testing.assert_array_equal(layer.v[::2], old.v[::2])


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_output_layer_can_be_applied_to_some_positions(tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    params, model = random_params(config), Transformer(config)
    whole = full_forward(config, params, TOKENS[:8])
    cache = kv.init_cache(config, 1, 8, jnp.float32)
    args = (jnp.asarray([TOKENS[:8]]), jnp.zeros(1, jnp.int32), cache)
    bound = model.bind({"params": params})
    x, _ = bound.hidden(*args, attend_len=8)
    logits = bound.logits(x[:, 5:6])
    np.testing.assert_allclose(logits[0], whole[5:6], atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "two_rows", "blocked", "native"])
def test_swiglu_survives_float16_overflow(form, request):
    """The product reaches 4e6: float16's largest is 65,504."""
    if form == "native":
        request.getfixturevalue("native_kernels")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 16)).astype(np.float16)
    gate, up = (rng.normal(size=(24, 16)).astype(np.float16) * 100 for _ in range(2))
    down = rng.normal(size=(16, 24)).astype(np.float16)
    g, u = (x.astype(np.float64) @ w.astype(np.float64).T for w in (gate, up))
    product = g / (1 + np.exp(-g.clip(-700))) * u
    assert np.abs(product).max() > 65504
    oracle = product @ down.astype(np.float64).T
    weights = [jnp.asarray(a) for a in (gate, up, down)]
    to_float16 = projection.rounds_to_float16(form, weights[2])
    linears = projection.IMPLEMENTATIONS[form]
    x = jnp.asarray(x, jnp.float32)
    ours = ops.swiglu(x, *weights, linears, lambda part: part, to_float16=to_float16)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, oracle, atol=2e-3 * np.abs(oracle).max())


def test_rope_at_long_positions():
    """float32 angles at position 4,000 stay within 3e-4 rad of float64's."""
    angles = ops.rope_angles(jnp.asarray([[4000]], jnp.int32), 128, 10000.0)
    exact = 4000 / 10000.0 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(angles[0, 0], exact, atol=3e-4)
