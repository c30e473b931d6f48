"""The package and docs/sampler.md are one law, and no row's bits depend on its neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.decode import sampling
from llama_jax.decode.filters import apply_filters
from llama_jax.decode.needs import Needs
from llama_jax.decode.sampling import NO_TOKEN, NOT_FINITE
from llama_jax.decode.state import init_state, make_admission
from llama_jax.decode.steps import emit
from llama_jax.decode.sums import log_softmax, sum_by_halves, sums_before
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import make_request
from llama_jax.weights.checkpoint import load_checkpoint
from tests.helpers import law
from tests.helpers.models import SMALL

ROWS = 8
SIZES = [12, 1000, 5000]  # the last beyond HEADS: the cut may lie where only a full sort finds it


@dataclasses.dataclass(frozen=True)
class Row:
    """What the law makes a token of; parameters as in the page's vectors."""

    logits: np.ndarray
    parameters: dict = dataclasses.field(default_factory=dict)
    seed: int = 7
    step: int = 0
    prompt: list = dataclasses.field(default_factory=list)
    output: list = dataclasses.field(default_factory=list)

    def by_the_page(self):
        return law.draw(*(getattr(self, field.name) for field in dataclasses.fields(self)))


def split(parameters):
    """The arguments of make_params, and those of make_bias."""
    bias = {name: parameters.get(name) for name in ("logit_bias", "allowed_tokens")}
    others = {"temperature": 1} | {k: v for k, v in parameters.items() if k not in bias}
    return {k: v if k == "top_k" else float(v) for k, v in others.items()}, bias


def arrays(rows):
    """The arguments of `sampling.sample`."""
    size = len(rows[0].logits)
    params = [sampling.make_params(r.seed, **split(r.parameters)[0]) for r in rows]
    return (
        jnp.asarray(np.stack([r.logits for r in rows])),
        jax.tree.map(lambda *values: np.concatenate(values), *params),
        jnp.asarray([r.step for r in rows], jnp.int32),
        jnp.asarray(np.stack([sampling.make_bias(size, **split(r.parameters)[1]) for r in rows])),
        jnp.asarray(np.stack([np.isin(np.arange(size), r.prompt) for r in rows])),
        jnp.asarray(
            np.stack([np.bincount(np.array(r.output, int), minlength=size) for r in rows]),
            jnp.int32,
        ),
    )


sample, filters = jax.jit(sampling.sample), jax.jit(apply_filters)


def draw(rows):
    return np.asarray(sample(*arrays(rows)).tokens).tolist()


# Random requests.


def draw_logits(rng, size):
    logits = rng.normal(0, rng.choice([0.01, 0.3, 1, 3, 10, 100]), size)
    if rng.random() < 0.3:
        logits = np.round(logits, rng.integers(0, 2))  # ties
    if rng.random() < 0.3:
        logits[rng.random(size) < 0.3] = 0.0
        logits[rng.random(size) < 0.2] = -0.0
    if rng.random() < 0.2:
        logits[rng.integers(0, size, 3)] += rng.choice([50, 1e4, 1e30])
    if rng.random() < 0.2:
        logits[rng.integers(0, size, 3)] = rng.choice([-1e30, -np.inf])
    if rng.random() < 0.03:
        logits[rng.integers(size)] = rng.choice([np.nan, np.inf])
    return logits.astype(np.float32)


def draw_parameters(rng, size):
    tokens = rng.permutation(size)[: min(size, 300)].tolist()
    uniform = rng.uniform
    values = {
        "temperature": [0, 1e-6, 1e-5, 0.01, 0.6, 1, 2.5, 5, uniform(0, 5)],
        "top_k": [1, 2, 40, 50, size - 1, size, size + 1, 1024, 1025, int(rng.integers(1, size))],
        "top_p": [0, 1e-30, 1e-4, 0.1, 0.5, 0.9, 0.999, 1, 2, uniform(0, 1)],
        "min_p": [0, 1e-9, 0.01, 0.1, 0.5, 1, uniform(0, 1)],
        "repetition_penalty": [0, 1, 1e-40, 1.2e-38, 0.5, 1.1, 2, uniform(0, 2)],
        "frequency_penalty": [0, 0.1, 2, uniform(0, 2)],
        "presence_penalty": [0, 0.1, 2, uniform(0, 2)],
        "logit_bias": [
            {token: float(rng.choice([-100, 100, 0.5, uniform(-9, 9)])) for token in tokens[:n]}
            for n in (1, 5, 300)
        ],
        "allowed_tokens": [tokens[:1], tokens[:4], tokens[:-1], np.arange(1, size).tolist()],
    }
    return {
        name: options[rng.integers(len(options))]
        for name, options in values.items()
        if rng.random() < 0.5
    }


def draw_row(rng, size):
    likely = rng.permutation(size)[:20]
    seeds = [0, 2**32, 2**64 - 1, int(rng.integers(2**64, dtype=np.uint64))]
    return Row(
        draw_logits(rng, size),
        draw_parameters(rng, size),
        seed=seeds[rng.integers(4)],
        step=int(rng.choice([0, 1, 255, 4095, 2**31 - 9, rng.integers(4096)])),
        prompt=rng.choice(likely, rng.integers(1, 40)).tolist(),
        output=rng.choice(likely, rng.integers(0, 40)).tolist(),
    )


def is_close_call(row, token):
    """Whether the page leaves the choice to the last bits of exp or log."""
    for name in {"top_p", "min_p"} & row.parameters.keys():
        for factor in (1 - 1e-6, 1 + 1e-6):
            nudged = row.parameters | {name: row.parameters[name] * factor}
            if dataclasses.replace(row, parameters=nudged).by_the_page() == token:
                return True
    scores = law.scores(row.logits, row.parameters, row.seed, row.step, row.prompt, row.output)
    if scores is None or token == NOT_FINITE:
        return False
    noise = law.noise(row.seed, row.step, len(row.logits))
    tolerance = 2e-6 * max(abs(noise[token]), abs(noise[np.argmax(scores)]))
    return scores.max() - scores[token] <= tolerance + np.spacing(abs(scores.max()))


@pytest.mark.parametrize(
    "count", [200, pytest.param(3000, marks=pytest.mark.exhaustive)], ids="{}_requests".format
)
def test_random_requests_are_drawn_as_the_page_says(count):
    """Four tokens of each, one after the other, in batches of mixed parameters."""
    rng, close_calls, tokens = np.random.default_rng(count), 0, 0
    for batch in range(count // ROWS):
        rows = [draw_row(rng, SIZES[batch % 3]) for _ in range(ROWS)]
        for _ in range(4):
            drawn = draw(rows)
            for row, token in zip(rows, drawn, strict=True):
                expected = row.by_the_page()
                if token != (NOT_FINITE if expected is None else expected):
                    assert is_close_call(row, token), (row, token, expected)
                    close_calls += 1
            tokens += len(drawn)
            rows = [
                dataclasses.replace(row, step=row.step + 1, output=[*row.output, max(token, 0)])
                for row, token in zip(rows, drawn, strict=True)
            ]
    assert close_calls <= tokens / 1000  # measured: none


def test_margins_are_the_distances_that_the_page_says():
    """Of the score, and of each filter from another cut."""
    rng, num_finite = np.random.default_rng(5), [0] * 4
    for batch in range(12):
        rows = [draw_row(rng, SIZES[batch % 3]) for _ in range(ROWS)]
        sampled = sample(*arrays(rows))
        found = np.stack([sampled.margin, *sampled.cuts], axis=-1)
        for row, token, ours in zip(rows, sampled.tokens, found, strict=True):
            if token == NOT_FINITE:
                continue
            expected = law.margins(*dataclasses.astuple(row))
            largest = np.abs(row.logits[np.isfinite(row.logits)]).max()
            atol = 1e-5 + 2e-6 * largest  # of the noise, and of a difference of two logits
            np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=atol, err_msg=str(row))
            num_finite = [
                n + bool(np.isfinite(each)) for n, each in zip(num_finite, ours, strict=True)
            ]
    assert min(num_finite) > 10


# The demo model, from end to end.

DEMO = load_checkpoint(DEMO_CHECKPOINT)
PROMPTS = [[1, *range(5 + i, 9 + 3 * i)] for i in range(4)]
REQUESTS = [
    {"temperature": 0, "logit_bias": {300: 3.5, 7: -100}, "frequency_penalty": 0.7},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 3.0, "min_p": 0.02, "presence_penalty": 1.1, "logit_bias": {5: 2.25}},
    {
        "temperature": 0.8,
        "top_k": 200,
        "top_p": 0.95,
        "min_p": 0.01,
        "logit_bias": {20: -1.5, 21: 4.0},
        "allowed_tokens": list(range(3, 900)),
        "repetition_penalty": 0.9,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
    },
]


@pytest.fixture(scope="module")
def llm():
    return Llama(DEMO, slots=8, reuse=False)


@pytest.mark.slow
def test_the_engine_generates_what_the_page_says(llm):
    """Prompts and decode steps on the device against the page's law over `Llama.logits`."""
    ex, vocab_size, count = llm.executor, DEMO.config.vocab_size, 24
    pieces = llm.tokenizer.vocab_size
    state, outputs = ex.init_state(), [[] for _ in REQUESTS]
    for slot, (prompt, parameters) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        others, bias = split(parameters)
        new = make_admission(
            sampling.make_params(2**63 + slot, **others),
            prompt,
            vocab_size,
            limit=count,
            stop_tokens=[NO_TOKEN] * len(DEMO.config.eos_tokens),
            bias=sampling.make_bias(vocab_size, **bias),
        )
        state, steps = ex.prefill(ex.admit(state, slot, new), slot, prompt)
        outputs[slot].append((steps.tokens[0, 0], steps.logprobs.chosen[0, 0]))
    while len(outputs[0]) < count:
        longest = max(map(len, PROMPTS)) + len(outputs[0])
        state, steps, slots = ex.decode(state, range(len(REQUESTS)), longest)
        for column, slot in enumerate(slots):
            if slot < len(REQUESTS):
                chosen = zip(steps.tokens[:, column], steps.logprobs.chosen[:, column], strict=True)
                outputs[slot] += chosen
    for slot, (prompt, parameters) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        tokens, logprobs = ([each[i].item() for each in outputs[slot][:count]] for i in (0, 1))
        logits = llm.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        expected = [
            law.draw(logits[t], parameters, 2**63 + slot, t, prompt, tokens[:t], pieces)
            for t in range(count)
        ]
        assert tokens == expected
        theirs = [law.log_probabilities(each)[t] for each, t in zip(logits, tokens, strict=True)]
        np.testing.assert_allclose(logprobs, theirs, rtol=0, atol=2e-6)


def run(engine, *generations):
    while not all(generation.done for generation in generations):
        engine.step()
    assert not any(generation.error for generation in generations)


@pytest.mark.parametrize("neighbours", [pytest.param(1, marks=pytest.mark.exhaustive), 7])
def test_neighbours_change_no_token_and_no_bit_of_a_logprob(llm, neighbours):
    """In version 1 the second token of this request was 301 beside seven others, and 276 alone."""
    prompt = [1, 981, 886, 973, 872, 60, 96, 89, 372, 858, 176, 756, 831, 688, 877, 318, 260, 623]
    request = make_request(
        prompt_tokens=[*prompt, 220, 624, 39],
        seed=302,
        top_p=0.5104979276657104,
        temperature=3,
        ignore_eos=True,
        max_tokens=2,
        logprobs=5,
    )
    answers = [
        make_request(
            prompt_tokens=[1, 5 + j], seed=j, temperature=3, ignore_eos=True, max_tokens=60
        )
        for j in range(7)
    ]
    engine = Engine(llm.executor, llm.tokenizer, reuse=False)
    alone = engine.submit(request)
    run(engine, alone)
    for other in answers[:neighbours]:
        engine.submit(other)
    for _ in range(2):
        engine.step()
    assert engine.running == neighbours
    beside = engine.submit(request)
    run(engine, beside)
    assert beside.result.tokens == alone.result.tokens
    assert beside.result.logprobs == alone.result.logprobs  # in bits


# Rows alone and together.


CUTS = [
    {"top_p": 0.51, "temperature": 3},
    {"top_p": 0.95, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"top_k": 40, "top_p": 0.3},
    {"top_k": 1500, "top_p": 0.999},
    {"min_p": 0.02, "temperature": 0.7},
    {"top_p": 0.9, "min_p": 0.001, "temperature": 5},
    {"temperature": 0, "repetition_penalty": 0.7, "presence_penalty": 0.4},
    {"logit_bias": {3: 1.7, 9: -0.3}, "frequency_penalty": 1.1},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "vocab_size",
    [
        13,
        pytest.param(2000, marks=pytest.mark.exhaustive),
        pytest.param(32_000, marks=pytest.mark.exhaustive),
    ],
)
def test_neighbours_change_no_bit_of_a_row(vocab_size):
    """Alone, and in batches of 3 and 8: tokens, scores, margins and log-probabilities."""
    rng = np.random.default_rng(vocab_size)
    texts = rng.integers(0, vocab_size, (ROWS, 2, 30))
    rows = [
        Row(rng.normal(0, 2, vocab_size).astype(np.float32), cut, seed, 5, *map(list, text))
        for seed, (cut, text) in enumerate(zip(CUTS, texts, strict=True))
    ]
    args = arrays(rows)

    @jax.jit
    def computed(logits, params, steps, bias, in_prompt, output_counts):
        cuts = {name: getattr(params, name) for name in ("top_k", "top_p", "min_p")}
        return (
            *jax.tree.leaves(
                sampling.sample(logits, params, steps, bias, in_prompt, output_counts)
            ),
            sampling.apply_penalties(logits, params, in_prompt, output_counts),
            *jax.tree.leaves(apply_filters(logits, **cuts)),
            log_softmax(logits),
        )

    together = computed(*args)
    for size in (1, 3):
        for start in range(0, ROWS - size + 1, size):
            part = slice(start, start + size)
            apart = computed(*jax.tree.map(lambda a, part=part: a[part], args))
            for ours, all_rows in zip(apart, together, strict=True):
                np.testing.assert_array_equal(ours, all_rows[part], f"rows {part}")


PENALTIES = ["repetition_penalty", "frequency_penalty", "presence_penalty"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's quotients are not exact")
def test_penalties_are_the_pages_in_bits():
    """XLA multiplies by a reciprocal, and fuses a product with a sum, where it is not kept from."""
    rng = np.random.default_rng(3)
    for size in SIZES:
        rows = [
            Row(
                rng.normal(0, 3, size).astype(np.float32),
                dict(zip(PENALTIES, drawn, strict=True)),
                prompt=rng.integers(0, size, size // 2).tolist(),
                output=rng.integers(0, size, 3 * size).tolist(),
            )
            for drawn in rng.uniform(0, 2, (ROWS, 3)).tolist()
        ]
        logits, params, _, _, *texts = arrays(rows)
        got = jax.jit(sampling.apply_penalties)(logits, params, *texts)
        page = [law.penalized(r.logits, r.parameters, r.prompt, r.output) for r in rows]
        np.testing.assert_array_equal(got, page)


def test_sums_are_the_pages_in_bits():
    values = np.random.default_rng(4).random((ROWS, 1500)).astype(np.float32)
    for size in (1, 2, 3, 1024, 1025, 1500):
        part = jnp.asarray(values[:, :size])
        halves, before = jax.jit(sum_by_halves)(part), jax.jit(sums_before)(part)
        np.testing.assert_array_equal(
            halves[:, 0], [law.sum_by_halves(v) for v in values[:, :size]]
        )
        np.testing.assert_array_equal(before[:, 0], 0)
        up_to = np.stack([law.sums_by_shifts(v) for v in values])
        np.testing.assert_array_equal(before[:, 1:], up_to[:, : size - 1])  # of any longer list


# Edges.

FILTERS = [{}, {"top_k": 1}, {"top_k": 1500}, {"top_p": 0.0}, {"top_p": 0.9}, {"min_p": 1.0}]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_row_that_is_not_finite_draws_nothing_and_changes_no_other(filters, temperature):
    """Wherever the NaN is: neither a filter nor a maximum in which XLA loses it hides it."""
    rng, size = np.random.default_rng(5), 1999
    parameters = {"temperature": temperature} | filters
    good = [Row(rng.normal(0, 2, size).astype(np.float32), parameters, i) for i in range(ROWS)]
    expected = draw(good)
    assert expected == [row.by_the_page() for row in good]

    def changed(row, value, at, **parameters):
        logits = row.logits.copy()
        logits[at] = value
        return dataclasses.replace(row, logits=logits, parameters=row.parameters | parameters)

    for at in [0, 3, 205, 1024, size - 1, *rng.integers(0, size, 10).tolist()]:
        # Disallowed, its logit counts all the same.
        others = [i for i in range(size) if i != at]
        bad = [
            changed(good[0], np.nan, at),
            changed(good[2], np.inf, at),
            changed(good[3], np.nan, at, allowed_tokens=others),
            changed(good[5], -np.inf, others, allowed_tokens=others, repetition_penalty=1.5),
            changed(good[7], np.nan, at, repetition_penalty=1.5, top_k=5, top_p=0.5, min_p=0.1),
        ]
        # In the text, and so penalized: an infinity stays one.
        bad[3:] = [dataclasses.replace(row, prompt=list(range(size))) for row in bad[3:]]
        rows = [bad[0], good[1], bad[1], bad[2], good[4], bad[3], good[6], bad[4]]
        assert [row.by_the_page() for row in bad] == [None] * 5
        left = {i: expected[i] for i in (1, 4, 6)}
        assert draw(rows) == [left.get(i, NOT_FINITE) for i in range(ROWS)], at


def test_a_quotient_that_overflows_draws_nothing():
    row = Row(np.array([5.0, 1.0], np.float32), {"repetition_penalty": 1.2e-38}, prompt=[0])
    assert row.by_the_page() is None
    assert draw([row]) == [NOT_FINITE]


def test_a_row_of_minus_infinities_but_one_draws_that_one():
    logits = np.full(1999, -np.inf, np.float32)
    logits[1500] = -1e30
    rows = [Row(logits, {"temperature": 1} | filters) for filters in FILTERS]
    assert draw(rows) == [1500] * len(FILTERS)


@pytest.mark.parametrize("penalty", [0.0, 1e-45, 1e-40, 1.1754942e-38])
def test_a_repetition_penalty_that_is_no_normal_number_is_off(penalty):
    logits = np.random.default_rng(6).normal(0, 1, 50).astype(np.float32)
    off, on = ({"repetition_penalty": value} for value in (1.0, penalty))
    text = list(range(40))
    tokens = [
        [draw([Row(logits, each, step=step, prompt=text)]) for step in range(20)]
        for each in (off, on)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("size", [pytest.param(12, marks=pytest.mark.exhaustive), 1999])
def test_min_p_1_keeps_the_tokens_that_equal_the_best(size):
    logits = np.full((1, size), 1.0, np.float32)
    logits[0, [2, 5, 11]] = 1.25
    one = jnp.ones(1)
    kept = filters(jnp.asarray(logits), top_k=jnp.zeros(1, int), top_p=one, min_p=one).logits
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [2, 5, 11]
    # Of those that top-p left, and relative to the best.
    kept = filters(jnp.asarray(logits), top_k=jnp.zeros(1, int), top_p=0 * one, min_p=one).logits
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [2]


def test_greedy_rows_have_no_filters():
    logits = np.random.default_rng(7).normal(0, 1, (ROWS, 40)).astype(np.float32)
    greedy = {"temperature": 0, "top_k": 1, "top_p": 0.0, "min_p": 1.0}
    sampled = {"temperature": 1, "top_k": 3}
    for others in (greedy, sampled):
        rows = [Row(x, (greedy, others)[i % 2]) for i, x in enumerate(logits)]
        assert draw(rows)[::2] == logits.argmax(axis=1)[::2].tolist()


@pytest.mark.slow
def test_an_idle_slot_emits_nothing_whatever_its_logits():
    """Nor does its NaN end it, or reach another slot."""
    size, state = SMALL.vocab_size, init_state(SMALL, 4, 16, "float32")
    logits = np.random.default_rng(8).normal(0, 1, (4, size)).astype(np.float32)
    logits[1:3, 50] = np.nan
    active = jnp.asarray([True, False, True, False])
    state = state._replace(done=~active, limits=jnp.full(4, 9), stop_tokens=state.stop_tokens - 1)
    after, outputs = emit(state, jnp.asarray(logits), Needs(), None)
    best = int(logits[0].argmax())
    assert outputs.tokens.tolist() == [best, NO_TOKEN, NOT_FINITE, NO_TOKEN]
    assert after.done.tolist() == [False, True, True, True]
    assert after.tokens.tolist() == [best, 0, 0, 0]
    assert after.steps.tolist() == [1, 0, 1, 0]
