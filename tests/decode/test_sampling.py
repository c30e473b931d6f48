"""The sampling law: exact rules, exact distributions, published vectors."""

import itertools
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llama_jax.decode import sampling
from llama_jax.decode.filters import apply_filters
from tests.helpers import ROOT, law

DOC = ROOT / "docs" / "sampler.md"
V = 12
LOGITS = np.array([2.0, 1.5, 1.5, 0.0, -0.5, 1.0, 0.3, -2.0, 0.3, 0.3, -1.0, 0.8], np.float32)
PROMPT, OUTPUT = [0, 3, 4], [1, 1, 1, 5, 4]
IN_PROMPT = np.isin(np.arange(V), PROMPT)
COUNTS = np.bincount(OUTPUT, minlength=V).astype(np.int32)


sample, filters = jax.jit(sampling.sample), jax.jit(apply_filters)
gumbel = jax.jit(sampling.gumbel, static_argnums=2)
penalised_by = jax.jit(sampling.apply_penalties)


def rows(n, **params):
    """The same parameters for n rows."""
    one = sampling.make_params(**params)
    return jax.tree.map(lambda a: np.repeat(np.asarray(a), n, axis=0), one)


def exact_distribution(
    *,
    temperature=0.0,
    top_k=None,
    top_p=None,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    min_p=0.0,
    logit_bias=None,
    allowed_tokens=None,
):
    """The law in float64, token by token, sharing nothing with the package."""
    x = [float(v) for v in LOGITS]
    for i in range(len(x)):
        x[i] += (logit_bias or {}).get(str(i), 0.0)
        if allowed_tokens is not None and i not in allowed_tokens:
            x[i] = -np.inf
        if repetition_penalty not in (0, 1) and (IN_PROMPT[i] or COUNTS[i]):
            x[i] = x[i] / repetition_penalty if x[i] > 0 else x[i] * repetition_penalty
        x[i] -= frequency_penalty * COUNTS[i]
        if COUNTS[i]:
            x[i] -= presence_penalty
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if temperature < 1e-5:
        return np.eye(len(x))[order[0]]
    weights = np.exp((np.array(x) - max(x)) / temperature)
    kept = order[: top_k or len(x)]
    total, before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and top_p is not None and top_p < 1 and before > top_p:
            break
        nucleus.append(i)
        before += weights[i] / total
    nucleus = [i for i in nucleus if weights[i] >= min_p]
    p = np.zeros(len(x))
    p[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return p


def exact_gumbel(seed, step, token):
    """The law's noise in float64, from the document alone."""
    key = law.threefry((seed >> 32, seed & 0xFFFFFFFF), (0, step))
    a, b = law.threefry(key, (0, token))
    return -np.log(-np.log1p(-((a ^ b) + 0.5) / 2**32))


def filtered_by(logits, params):
    """The logits that these rows' filters leave."""
    top_k, top_p, min_p = map(jnp.asarray, (params.top_k, params.top_p, params.min_p))
    return filters(logits, top_k=top_k, top_p=top_p, min_p=min_p).logits


def draw(n, first_step=0, seed=1, logit_bias=None, allowed_tokens=None, **params):
    """n draws of one request: steps first_step to first_step + n - 1."""
    tile = lambda a: jnp.broadcast_to(jnp.asarray(a)[None], (n, V))  # noqa: E731
    by_id = {int(token): value for token, value in (logit_bias or {}).items()}
    drawn = sample(
        tile(LOGITS),
        rows(n, seed=seed, **params),
        jnp.arange(first_step, first_step + n, dtype=jnp.int32),
        tile(sampling.make_bias(V, by_id, allowed_tokens)),
        tile(IN_PROMPT),
        tile(COUNTS),
    )
    return np.asarray(drawn.tokens)


PENALTIES = ["repetition_penalty", "frequency_penalty", "presence_penalty"]
GRID = {
    "temperature": [0.3, 0.6, 1.0, 2.5, 5.0],
    "top_k": [None, 1, 3, 7, 50],
    "top_p": [None, 0.0, 0.35, 0.9, 1.0, 2.0],
    "min_p": [0.0, 0.02, 0.2],
    "penalties": [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.7, 0.5, 1.1), (2.0,) * 3],
    "logit_bias": [None, {"0": -100.0, "7": 3.5}, {"2": -0.75, "8": 1.25, "10": 2.0}],
    "allowed_tokens": [None, None, [2, 3, 4, 5, 7, 8, 10, 11]],
}


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(150, marks=pytest.mark.slow),
        pytest.param(750, marks=pytest.mark.exhaustive),
    ],
)
def test_chi_square_over_the_grid(count):
    """20,000 draws of each of 750 combinations, of 20,250, against the exact distribution.

    Each p-value is uniform if the law holds: the smallest of 750 falls below 1e-6 once in 1,300
    runs of other seeds, and with this seed it does not. The p-values' own distribution is tested
    too (Kolmogorov-Smirnov), so a small bias everywhere shows as well.
    """
    n, p_values = 20_000, []
    combinations = list(itertools.product(*GRID.values()))
    for i, values in enumerate(random.Random(0).sample(combinations, count)):
        parameters = dict(zip(GRID, values, strict=True))
        penalties = zip(PENALTIES, parameters.pop("penalties"), strict=True)
        parameters |= penalties
        got = draw(n, seed=i, **parameters)
        p = exact_distribution(**parameters)
        counts = np.bincount(got, minlength=V)
        assert not counts[p == 0].any(), parameters
        common = p * n >= 5  # the chi-square approximation's condition; the rest is pooled
        observed, expected = counts[common], p[common] * n
        if (rest := 1 - p[common].sum()) * n >= 5:
            observed, expected = (
                np.append(observed, n - observed.sum()),
                np.append(expected, rest * n),
            )
        if len(observed) > 1:
            expected = expected * observed.sum() / expected.sum()
            p_values.append(stats.chisquare(observed, expected).pvalue)
    assert len(p_values) > count / 2
    assert min(p_values) > 1e-6
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_noise_is_gumbel():
    """The noise's own distribution, tails included: 1.6 million values against the exact one."""
    noise = np.concatenate(
        [np.asarray(gumbel(sampling.seed_words(3), jnp.int32(t), 32_000)) for t in range(50)]
    )
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    tail = noise[noise > 8]
    assert (
        stats.kstest(
            tail - 8,
            lambda x: (stats.gumbel_r.cdf(x + 8) - stats.gumbel_r.cdf(8)) / stats.gumbel_r.sf(8),
        ).pvalue
        > 1e-3
    )


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**32 + 7, 9_999_999_999, 2**64 - 1])
def test_noise_equals_the_document(seed):
    """All 64 bits of the seed count, where jax.random.key takes 32."""
    for step in (0, 1, 300):
        noise = gumbel(sampling.seed_words(seed), jnp.int32(step), 50)
        exact = [exact_gumbel(seed, step, token) for token in range(50)]
        np.testing.assert_allclose(noise, exact, rtol=2e-6, atol=1e-6)


def test_uniforms_are_never_0_or_1():
    bits = jnp.asarray([0, 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 1], jnp.uint32)
    uniform = np.asarray(sampling._open_unit(bits))
    assert (uniform > 0).all()
    assert (uniform < 1).all()
    assert np.isfinite(np.asarray(-jnp.log(-jnp.log1p(-uniform)))).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-8, 9e-6])
def test_greedy_is_exact_and_ties_go_to_the_lower_id(temperature):
    logits = np.full((3, V), -1.0, np.float32)
    logits[0, [5, 7]] = 4.0
    logits[1, [11]] = 4.0
    none = jnp.zeros((3, V)), jnp.zeros((3, V), bool), jnp.zeros((3, V), jnp.int32)
    for seed in range(20):
        params = rows(3, seed=seed, temperature=temperature, top_p=0.5, top_k=40)
        drawn = sample(jnp.asarray(logits), params, jnp.zeros(3, jnp.int32), *none).tokens
        assert drawn.tolist() == [5, 11, 0]


@pytest.mark.parametrize(
    ("masses", "cuts"),
    [
        (
            [0.5, 0.3, 0.15, 0.05],
            [(0.0, 1), (0.49, 1), (0.51, 2), (0.9, 3), (0.96, 4), (1.0, 4), (2.0, 4)],
        ),
        # cumulative mass is exact in float32 here, and only *more* than top_p cuts
        ([0.25] * 4, [(0.0, 1), (0.25, 2), (0.5, 3), (0.75, 4)]),
    ],
)
def test_top_p_keeps_the_token_that_crosses(masses, cuts):
    logits = jnp.log(jnp.asarray([masses], jnp.float32))
    for top_p, kept in cuts:
        filtered = filtered_by(logits, rows(1, top_p=top_p))
        assert np.flatnonzero(np.isfinite(filtered[0])).tolist() == list(range(kept)), top_p


def test_penalties_by_hand():
    logits = jnp.asarray([[2.0, -2.0, 2.0, -2.0, 3.0]], jnp.float32)
    in_prompt = jnp.asarray([[True, True, False, False, False]])
    counts = jnp.asarray([[0, 0, 3, 1, 0]], jnp.int32)
    params = rows(1, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    penalised = penalised_by(logits, params, in_prompt, counts)
    assert penalised.tolist() == [[1.0, -4.0, 1.0 - 1.75, -4.0 - 0.75, 3.0]]


@pytest.mark.parametrize("repetition", [0.0, 1.0])
def test_repetition_penalty_0_and_1_are_off(repetition):
    params = rows(1, repetition_penalty=repetition)
    args = jnp.asarray(LOGITS)[None], params, jnp.ones((1, V), bool), jnp.ones((1, V), jnp.int32)
    np.testing.assert_array_equal(penalised_by(*args), args[0])


def test_a_draw_depends_on_seed_and_step_alone():
    """Not on the row, the batch, the neighbours, or where the output was resumed."""
    alone = draw(40, temperature=2.0, seed=9)
    np.testing.assert_array_equal(draw(16, first_step=24, temperature=2.0, seed=9), alone[24:])
    shuffled = np.random.default_rng(0).permutation(40)
    steps = jnp.asarray(shuffled, jnp.int32)
    tile = lambda a: jnp.broadcast_to(jnp.asarray(a)[None], (40, V))  # noqa: E731
    others = rows(40, seed=9, temperature=2.0)
    state = tile(np.zeros(V, np.float32)), tile(IN_PROMPT), tile(COUNTS)
    drawn = sample(tile(LOGITS), others, steps, *state).tokens
    np.testing.assert_array_equal(drawn, alone[shuffled])


def test_noise_does_not_depend_on_the_vocabulary_or_a_global_flag():
    words = sampling.seed_words(5)
    whole = np.asarray(gumbel(words, jnp.int32(3), 1000))
    np.testing.assert_array_equal(gumbel(words, jnp.int32(3), 10), whole[:10])
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(gumbel(words, jnp.int32(3), 1000), whole)


def published_vectors():
    """The fenced JSON blocks of docs/sampler.md."""
    return [json.loads(b) for b in re.findall(r"```json\n(.*?)```", DOC.read_text("utf-8"), re.S)]


def test_published_vectors():
    assert str([round(float(x), 1) for x in LOGITS]) in DOC.read_text("utf-8")
    version, noise, tokens, cuts = published_vectors()
    assert version["sampler_version"] == sampling.SAMPLER_VERSION
    assert len(noise) >= 4
    assert len(tokens) >= 8
    assert len(cuts) >= 3
    for vector in noise:
        words = sampling.seed_words(vector["seed"])
        got = gumbel(words, jnp.int32(vector["step"]), 4)
        np.testing.assert_allclose(got, vector["gumbel"], rtol=2e-6)
        page = law.noise(vector["seed"], vector["step"], 4)
        np.testing.assert_allclose(page, vector["gumbel"], rtol=2e-6)
    for vector in tokens:
        got = draw(16, seed=vector["seed"], **vector["parameters"])
        assert got.tolist() == vector["tokens"], vector
        request = LOGITS, vector["parameters"], vector["seed"]
        page = [law.draw(*request, step, PROMPT, OUTPUT) for step in range(16)]
        assert page == vector["tokens"], vector
    for vector in cuts:
        logits = np.array(vector["logits"], np.float32)
        parameters = {"top_p": vector["top_p"]}
        filtered = filtered_by(jnp.asarray(logits[None]), rows(1, **parameters))[0]
        for kept in (filtered, law.kept(logits, parameters)):
            assert np.flatnonzero(np.isfinite(kept)).tolist() == vector["kept"], vector


LONG = 5000  # beyond HEADS: the cut may lie where only a full sort finds it
CUTS = [
    {"top_k": 40},
    {"top_k": 64},
    {"top_k": 65},
    {"top_k": 1024},
    {"top_k": 1025},
    {"top_k": 3000, "top_p": 0.7},
    {"top_p": 0.5},
    {"top_p": 0.99},
    {"top_p": 1.0},
    {"top_k": 7, "top_p": 0.3},
    {"top_k": 5000},
    {"top_k": 9999},
    {"top_k": 9999, "top_p": 0.3},
    {},
]


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_cuts_of_a_long_vocabulary(cut, scale):
    """What stays, against float64; ties among the logits, but none of mass at the cut."""
    logits = np.round(np.random.default_rng(0).normal(0, scale, LONG), 2).astype(np.float32)
    got = np.asarray(filtered_by(jnp.asarray(logits[None]), rows(1, **cut)))[0]
    order = np.lexsort((np.arange(LONG), -logits))
    kept = order[: cut.get("top_k", LONG)]
    weights = np.exp(logits[kept].astype(np.float64))
    before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    top_p = cut.get("top_p", 1.0)
    assert top_p == 1 or np.abs(before - top_p).min() > 1e-6
    kept = kept[before <= top_p] if top_p < 1 else kept
    np.testing.assert_array_equal(np.flatnonzero(got > -np.inf), np.sort(kept))
    np.testing.assert_array_equal(got[kept], logits[kept])


@pytest.mark.parametrize("vocab_size", [12, LONG])
def test_both_zeros_are_one_logit(vocab_size):
    """-0 and 0 tie, so the lower id comes first, whichever it is."""
    logits = np.full((1, vocab_size), -1.0, np.float32)
    logits[0, [3, 5, 9]] = -0.0, 0.0, 0.0
    for top_k, kept in ((1, [3]), (2, [3, 5]), (3, [3, 5, 9])):
        got = filtered_by(jnp.asarray(logits), rows(1, top_k=top_k))
        assert np.flatnonzero(np.asarray(got)[0] > -np.inf).tolist() == kept
