"""The decode contract, on a real small model and on one whose answer is known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.decode import sampling
from llama_jax.decode import state as decode_state
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import choose_plan
from llama_jax.decode.sampling import NO_TOKEN
from tests.helpers.models import CONFIG, NATIVE, PURE, PURE_MARKS, random_params

PROMPT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 40).tolist()
SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}


def make(params=None, dtype="float32", plan=None, batch=1, **changes):
    """An executor of the small model by a plan (None: this machine's), with `changes`."""
    plan = (plan or choose_plan(CONFIG, dtype))._replace(**changes)
    params = params or random_params(CONFIG, jnp.dtype(dtype))
    return Executor(CONFIG, params, dtype, batch=batch, context=600, plan=plan)


def admit(ex, state, row, prompt, limit, stop=NO_TOKEN, **params):
    """Let a row read a prompt; return the state and its first token in a list."""
    stops = stop if isinstance(stop, list) else [stop]
    stops += [NO_TOKEN] * (len(ex.config.eos_tokens) - len(stops))
    new = decode_state.make_admission(
        sampling.make_params(**params),
        prompt,
        ex.config.vocab_size,
        limit=limit,
        stop_tokens=stops,
    )
    state, drawn = ex.prefill(ex.admit(state, row, new), row, prompt)
    return state, np.asarray(drawn.tokens)[:, 0].tolist()


def decode_rows(ex, state, rows, longest):
    """Decode a chunk of some rows; return the state and each one's tokens."""
    state, drawn, computed = ex.decode(state, rows, longest)
    columns = np.asarray(drawn.tokens)[:, [computed.index(row) for row in rows]].T.tolist()
    return state, [[token for token in column if token != NO_TOKEN] for column in columns]


def run(ex, prompt, limit, *, row=0, stop=NO_TOKEN, **params):
    """Generate one request in one row; return its tokens."""
    state, tokens = admit(ex, ex.init_state(), row, prompt, limit, stop, **params)
    for asked in range(1, limit, ex.plan.decode_steps):
        state, (more,) = decode_rows(ex, state, [row], len(prompt) + asked - 1)
        tokens += more
    return tokens


# Where it is not the one in use, the pure one compiles twice as long for the same laws.
@pytest.fixture(scope="module", params=[pytest.param("pure", marks=PURE_MARKS), "native"])
def plan(request):
    """Both of the plans that a CPU may have: every law holds for each."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return {"pure": PURE, "native": NATIVE}[request.param]


@pytest.fixture(scope="module")
def ex(plan):
    return make(plan=plan)


@pytest.fixture(scope="module")
def batch_ex(plan):
    return make(plan=plan, batch=4)


def successor_params():
    """A model by hand: whatever token it is fed, its logits are one-hot of token + 1.

    No layer contributes (their output projections are zero), each token's embedding is one-hot,
    and the output layer's row t + 1 is the embedding of t.
    """
    config = dataclasses.replace(CONFIG, vocab_size=24, num_layers=1)
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["embed"] = jnp.eye(24)
    params["final_norm"] = jnp.ones(24)
    params["lm_head"] = jnp.roll(jnp.eye(24), 1, axis=0)
    return config, params


def make_successor(params=None, batch=1, drawable=None, **changes):
    config, successor = successor_params()
    config = dataclasses.replace(config, **changes)
    plan = choose_plan(config, "float32")._replace(decode_steps=4)
    params = params or successor
    return Executor(
        config, params, "float32", batch=batch, context=64, plan=plan, drawable=drawable
    )


@pytest.fixture(scope="module")
def successor():
    """Of three rows, each of which may have three stop tokens."""
    return make_successor(batch=3, eos_tokens=(11, 2, 7))


def test_counts_up_by_hand(successor):
    ex = successor
    assert run(ex, [5, 9], 10) == list(range(10, 20))
    assert run(ex, [22], 4) == [23, 0, 1, 2]
    assert run(ex, [3], 1) == [4]


@pytest.mark.parametrize("stop", [4, 5, 6, 7, 8, 9])
def test_stops_at_the_stop_token_wherever_it_falls_in_a_chunk(successor, stop):
    assert run(successor, [3], 16, stop=stop) == list(range(4, stop + 1))


def test_stops_at_whichever_of_several_stop_tokens_comes_first(successor):
    ex = successor
    for start, expected in ((3, [4, 5, 6, 7]), (8, [9, 10, 11])):
        assert run(ex, [start], 16, stop=[11, 2, 7]) == expected
        assert run(ex, [start], 16, stop=[NO_TOKEN] * 3) == [(start + n) % 24 for n in range(1, 17)]


@pytest.mark.slow
def test_ids_that_are_not_drawable_are_sampled_by_a_model_without_them():
    """The tokens are those of the model whose last rows were cut off."""
    config, whole = successor_params()
    rng = np.random.default_rng(0)
    whole["embed"] = jnp.asarray(rng.normal(size=(24, 24)), jnp.float32)
    whole["lm_head"] = jnp.asarray(rng.normal(size=(24, 24)) + 3, jnp.float32)
    cut = whole | {"embed": whole["embed"][:17], "lm_head": whole["lm_head"][:17]}
    models = (
        make_successor(whole, drawable=17),
        make_successor(cut, vocab_size=17),
        make_successor(whole),
    )
    sampled = {"temperature": 3.0, "top_p": 0.9, "top_k": 9}
    # The programs of the second serve the third too.
    for params in ({}, sampled, {"temperature": 2.0, "seed": 3}):
        limited, expected, free = (
            run(ex, [5, 9], 24, repetition_penalty=1.2, **params) for ex in models
        )
        assert limited == expected != free
    assert config.vocab_size == 24


def test_rows_stop_independently(successor):
    ex = successor
    state = ex.init_state()
    columns = []
    for row, (start, limit, stop) in enumerate([(3, 9, NO_TOKEN), (10, 9, 13), (20, 2, NO_TOKEN)]):
        state, first = admit(ex, state, row, [start], limit, stop)
        columns.append(first)
    for _ in range(2):
        state, more = decode_rows(ex, state, [0, 1, 2], 20)
        columns = [column + new for column, new in zip(columns, more, strict=True)]
    assert columns == [list(range(4, 13)), [11, 12, 13], [21, 22]]
    assert np.asarray(state.done).all()


def test_greedy_equals_the_model_fed_its_own_output(ex):
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(ex.logits(tokens)[-1].argmax()))
    assert run(ex, PROMPT, 12) == tokens[len(PROMPT) :]


def test_prefill_equals_score_at_every_length(ex):
    """Across the ladder of chunk sizes, padding and the chunk boundary at 256."""
    long = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 530).tolist()
    logits = ex.logits(long)
    ends = (16, 32, 64, 128, 256, 512)
    for length in (1, 300, 530, *(end + more for end in ends for more in (-1, 0, 1))):
        assert run(ex, long[:length], 1) == [int(logits[length - 1].argmax())]


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_chunk(ex):
    requests = [{"seed": 5, **SAMPLED}, {}]  # the first one's programs serve the greedy one too
    expected = [run(ex, PROMPT, 33, **params) for params in requests]
    for steps in (1, 3, 16):
        other = make(ex.params, plan=ex.plan, decode_steps=steps)
        assert [run(other, PROMPT, 33, **params) for params in requests] == expected, steps


def test_tokens_do_not_depend_on_the_prefill_ladder(ex):
    expected = run(ex, PROMPT, 20, seed=3, **SAMPLED)
    other = make(ex.params, plan=ex.plan, prefill_sizes=(24, 96))
    assert run(other, PROMPT, 20, seed=3, **SAMPLED) == expected


def busy_state(ex, rows=range(4)):
    """Rows that draw, each at its own position; their prompts have 40, 79, 114 and 145 tokens."""
    state = ex.init_state()
    for row in rows:
        prompt = (PROMPT * 4)[: (row + 1) * (40 - row)]
        state, _ = admit(ex, state, row, prompt, 200, seed=row, **SAMPLED)
    return state


def entries(state, row):
    """What a state holds of a row, but for its cache."""
    return jax.tree.map(lambda a: np.asarray(a[row]), state._replace(cache=()))


def cached(state, row, length):
    """A row's first slots, of every layer."""
    return [np.asarray(slots[row, :, :length]) for slots in jax.tree.leaves(state.cache)]


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_released_row_draws_nothing_and_keeps_its_cache(batch_ex):
    ex = batch_ex
    state = busy_state(ex, range(2))
    expected = run(ex, PROMPT, 9, seed=0, **SAMPLED)[1:]
    state = ex.release(state, 1)
    position = int(state.positions[1])
    before = cached(state, 1, position)
    state, (going, released) = decode_rows(ex, state, [0, 1], 150)
    assert (going, released) == (expected, [])
    assert int(state.positions[1]) == position == 78
    assert_equal(cached(state, 1, position), before)
    # It can be given to another at once.
    state, tokens = admit(ex, state, 1, PROMPT, 9, seed=0, **SAMPLED)
    state, (_, more) = decode_rows(ex, state, [0, 1], 150)
    assert (tokens + more)[1:] == expected


def test_copy_slot_copies_a_cache_and_nothing_else(batch_ex):
    ex = batch_ex
    state = busy_state(ex)
    before = jax.tree.map(np.array, state)
    state = ex.copy_slot(state, 3, 1)
    assert_equal(cached(state, 1, ex.sizes.capacity), cached(before, 3, ex.sizes.capacity))
    for row in (0, 2, 3):
        assert_equal(cached(state, row, ex.sizes.capacity), cached(before, row, ex.sizes.capacity))
    for row in range(4):
        assert_equal(entries(state, row), entries(before, row))


@pytest.mark.parametrize("rows", [[2], [3, 1], [0, 1, 3], [0, 1, 2, 3]])
def test_every_column_says_whose_it_is(batch_ex, rows):
    ex = batch_ex
    state, drawn, computed = ex.decode(busy_state(ex, rows), rows, 150)
    columns = np.asarray(drawn.tokens).T
    assert columns.shape == (len(computed), ex.plan.decode_steps)
    assert len(set(computed)) == len(computed)
    assert set(rows) <= set(computed)
    if ex.plan.batch_invariant:
        assert len(computed) == {1: 1, 2: 2, 3: 4, 4: 4}[len(rows)]
    for row, column in zip(computed, columns, strict=True):
        assert (column != NO_TOKEN).all() == (row in rows)
        assert (column == NO_TOKEN).all() == (row not in rows)
        assert row not in rows or column[-1] == state.tokens[row]


def test_a_call_runs_as_many_steps_as_it_is_given_or_until_all_rows_are_done(successor):
    ex, unused = successor, [NO_TOKEN]
    state, _ = admit(ex, ex.init_state(), 0, [5], 20)
    state, _ = admit(ex, state, 1, [8], 3)
    state, drawn, computed = ex.decode(state, [0, 1], 10, steps=1)
    columns = np.asarray(drawn.tokens)[:, [computed.index(0), computed.index(1)]].T.tolist()
    assert columns == [[7, *unused * 3], [10, *unused * 3]]
    assert state.positions.tolist()[:2] == [2, 2]
    assert (np.asarray(drawn.measures)[1:] == NO_TOKEN).all()  # not computed
    state, (one, other) = decode_rows(ex, state, [0, 1], 10)
    assert (one, other) == ([8, 9, 10, 11], [11])
    state = ex.release(state, 0)
    state, drawn, _ = ex.decode(state, [0, 1], 10)
    assert (np.asarray(drawn.measures) == NO_TOKEN).all()
    fixed = make_successor(ex.params)
    fixed.plan = fixed.plan._replace(varied_steps=False)
    with pytest.raises(AssertionError):
        fixed.decode(fixed.init_state(), [0], 10, steps=1)


def test_penalties_count_prompt_and_output_as_the_law_says():
    """By hand: token 5 says itself with logit sqrt(24) = 4.9, and 6 with 0.3 of that, 1.47."""
    _, params = successor_params()
    head = params["lm_head"].at[5, 5].set(1.0).at[6, 5].set(0.3)
    ex = make_successor({**params, "lm_head": head})
    assert run(ex, [5], 5) == [5, 5, 5, 5, 5]
    assert run(ex, [5], 4, frequency_penalty=2.0) == [5, 5, 6, 7]  # 4.9, 2.9, then 0.9
    assert run(ex, [5, 5, 5], 4, frequency_penalty=2.0) == [5, 5, 6, 7]  # the output's alone
    assert run(ex, [5], 3, presence_penalty=2.0) == [5, 5, 5]  # 4.9, then 2.9 however often
    weak = params["lm_head"].at[5, 5].set(0.5).at[6, 5].set(0.3)
    ex = make_successor({**params, "lm_head": weak})
    assert run(ex, [5], 2) == [5, 5]
    assert run(ex, [5], 2, repetition_penalty=2.0) == [6, 7]  # the prompt's 5: 2.45 / 2 < 1.47
    assert run(ex, [5], 2, presence_penalty=1.0) == [5, 6]  # the output's 5: 2.45 - 1 < 1.47


def named(ex, *kinds):
    """The names of the programs that were compiled, of the kinds given."""
    return [name for name in ex.compiled.names if name.split("(")[0] in kinds]


def test_the_cache_is_donated(ex):
    """The compiled programs alias every byte of the cache: nothing of it is copied out."""
    run(ex, PROMPT, 9)
    assert_donated(ex)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [pytest.param("float16", marks=pytest.mark.exhaustive), "bfloat16"]
)
def test_a_cache_of_16_bits_is_donated(dtype):
    ex = make(dtype=dtype)
    run(ex, PROMPT, 9)
    assert_donated(ex)


def assert_donated(ex):
    state = ex.init_state()
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(state.cache))
    state_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
    for name in ("admit", *named(ex, "prefill", "first_token", "decode")):
        aliased = ex.programs[name].memory_analysis().alias_size_in_bytes
        assert aliased == state_bytes > cache_bytes, name


def test_the_cache_is_not_copied(batch_ex):
    """float32, prefill and decode: the temporaries are a small part of what the cache holds."""
    ex = batch_ex
    run(ex, PROMPT * 10, 9, row=1)
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(ex.init_state().cache))
    for name in named(ex, "prefill", "decode"):
        program = ex.programs[name]
        slots = f"f32[4,2,{ex.sizes.capacity},6]"
        copies = [line for line in program.as_text().splitlines() if f"= {slots}" in line]
        assert copies, name  # the shape is spelled as expected
        assert not any(" copy(" in line for line in copies), name
        if name.startswith("decode"):
            assert program.memory_analysis().temp_size_in_bytes < cache_bytes / 4


def test_no_weight_is_captured_as_a_constant(ex):
    """Every weight and every byte of the state comes in as an argument."""
    run(ex, PROMPT, 9)
    ex.logits(PROMPT)
    state = ex.init_state()
    output_layer = {"final_norm", "lm_head"} & ex.params.keys()
    layers = {name: part for name, part in ex.params.items() if name not in output_layer}
    held = {
        "prefill": (layers, state),
        "first_token": ([ex.params[name] for name in output_layer], state),
        "decode": (ex.params, state),
        "logits": (ex.params, state.cache),
    }
    for name in named(ex, *held):
        expected = sum(a.nbytes for a in jax.tree.leaves(held[name.partition("(")[0]]))
        assert ex.programs[name].memory_analysis().argument_size_in_bytes >= expected, name
