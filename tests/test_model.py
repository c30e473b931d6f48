import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_config import SMALL

from llama_jax import cache as kv
from llama_jax import ops
from llama_jax.model import Llama, forward, init_params

TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, 40).tolist()
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
}
CASES = [SMALL, *(dataclasses.replace(SMALL, **{n: v}) for n, v in PERTURBED.items())]


def random_params(config, dtype=jnp.float32, seed=0):
    """Parameters whose norms are not all one, so that leaving one out shows."""
    params = init_params(config, jax.random.key(seed), jnp.float32)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [a + 0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.map(lambda a: a.astype(dtype), jax.tree.unflatten(tree, noisy))


jit_forward = jax.jit(forward, static_argnums=0, static_argnames="attend_len")


def full_forward(config, params, tokens, dtype=jnp.float32, attend_len=None):
    """Logits of one sequence at once, through a cache of its own."""
    attend_len = attend_len or len(tokens)
    cache = kv.init_cache(config, 1, attend_len, dtype)
    args = (jnp.asarray([tokens]), jnp.zeros(1, jnp.int32), cache)
    return jit_forward(Llama(config, dtype), params, *args, attend_len=attend_len)[0][0]


@pytest.mark.parametrize("config", CASES, ids=["small", *PERTURBED])
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
    if name not in ("norm_eps", "rope_theta"):
        assert jax.tree.map(jnp.shape, before) != jax.tree.map(jnp.shape, random_params(changed))
    else:
        a, b = full_forward(SMALL, before, TOKENS), full_forward(changed, before, TOKENS)
        assert float(jnp.abs(a - b).max()) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_close(dtype):
    """Bounds: twice what was measured (float16 0.0047, bfloat16 0.073 of the logits' spread)."""
    params = random_params(SMALL, dtype)
    oracle = reference.logits(params, SMALL, TOKENS)
    error = np.abs(np.asarray(full_forward(SMALL, params, TOKENS, dtype)) - oracle)
    assert error.max() / oracle.std() < {jnp.float16: 0.01, jnp.bfloat16: 0.15}[dtype]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_cached_equals_uncached_at_every_split(dtype):
    params, model = random_params(SMALL, dtype), Llama(SMALL, dtype)
    tokens = TOKENS[:12]
    whole = full_forward(SMALL, params, tokens, dtype)

    def run(part, start, cache):
        padded = jnp.asarray([part + [0] * (12 - len(part))])
        start = jnp.full(1, start, jnp.int32)
        logits, cache = jit_forward(model, params, padded, start, cache, attend_len=24)
        return logits[0, : len(part)], cache

    for split in range(1, len(tokens)):
        first, cache = run(tokens[:split], 0, kv.init_cache(SMALL, 1, 24, dtype))
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
        logits, _ = jit_forward(Llama(SMALL), params, tokens, start, cache, attend_len=64)
        outputs.append(np.asarray(logits[0, :10]))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_bits_do_not_depend_on_the_bucket(dtype):
    config = dataclasses.replace(SMALL, max_seq_len=2048)
    params = random_params(config, dtype)
    model = Llama(config, dtype)
    tokens = jnp.asarray([TOKENS])
    outputs = []
    for attend_len in (256, 512, 1024, 2048):
        cache = kv.init_cache(config, 1, 2048, dtype)
        start = jnp.zeros(1, jnp.int32)
        logits, _ = jit_forward(model, params, tokens, start, cache, attend_len=attend_len)
        outputs.append(np.asarray(logits))
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)


def test_one_row_of_many():
    """Prefill of one row leaves the others' slots alone and equals that row run by itself."""
    params = random_params(SMALL)
    cache = jax.tree.map(lambda a: a + 1, kv.init_cache(SMALL, 3, 16, jnp.float32))
    tokens, start = jnp.asarray([TOKENS[:8]]), jnp.full(1, 4, jnp.int32)
    args = (Llama(SMALL), params, tokens, start)
    logits, after = jit_forward(*args, cache, row=jnp.asarray(1, jnp.int32), attend_len=16)
    alone = jax.tree.map(lambda a: a[1:2], cache)
    expected, alone = jit_forward(*args, alone, attend_len=16)
    np.testing.assert_array_equal(logits, expected)
    for layer, lone, old in zip(after, alone, cache, strict=True):
        np.testing.assert_array_equal(layer.k[1], lone.k[0])
        np.testing.assert_array_equal(layer.v[::2], old.v[::2])


def test_last_selects_one_position():
    params = random_params(SMALL)
    whole = full_forward(SMALL, params, TOKENS[:8])
    cache = kv.init_cache(SMALL, 1, 8, jnp.float32)
    args = (jnp.asarray([TOKENS[:8]]), jnp.zeros(1, jnp.int32), cache)
    last = jnp.asarray([5], jnp.int32)
    logits, _ = jit_forward(Llama(SMALL), params, *args, attend_len=8, last=last)
    np.testing.assert_allclose(logits[0], whole[5:6], atol=1e-5)


def test_swiglu_survives_float16_overflow():
    """The product reaches 4e6: float16's largest is 65,504."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 16)).astype(np.float32)
    gate, up = (rng.normal(size=(24, 16)).astype(np.float16) * 100 for _ in range(2))
    down = rng.normal(size=(16, 24)).astype(np.float16)
    g, u = (x.astype(np.float16).astype(np.float64) @ w.astype(np.float64).T for w in (gate, up))
    product = g / (1 + np.exp(-g.clip(-700))) * u
    assert np.abs(product).max() > 65504
    oracle = product @ down.astype(np.float64).T
    ours = np.asarray(ops.swiglu(*(jnp.asarray(a) for a in (x, gate, up, down))))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, oracle, atol=2e-3 * np.abs(oracle).max())


def test_rope_at_long_positions():
    """float32 angles at position 4,000 stay within 3e-4 rad of float64's."""
    angles = ops.rope_angles(jnp.asarray([[4000]], jnp.int32), 128, 10000.0)
    exact = 4000 / 10000.0 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(angles[0, 0], exact, atol=3e-4)
