"""The decode contract, on a real small model and on one whose answer is known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import SMALL
from test_model import random_params

from llama_jax import decode, executor, sampling
from llama_jax.decode import NO_TOKEN
from llama_jax.executor import Executor, padded

CONFIG = dataclasses.replace(SMALL, max_seq_len=600)
PROMPT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 40).tolist()
SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}


def make(params=None, dtype="float32", **options):
    options = {"context": 600, "decode_steps": 8} | options
    params = params or random_params(CONFIG, jnp.dtype(dtype))
    return Executor(CONFIG, params, dtype, **options)


def run(ex, prompt, limit, *, row=0, state=None, stop=NO_TOKEN, **params):
    """Generate one request in one row; return its tokens."""
    state = state or ex.init_state()
    state = ex.admit(state, row, sampling.make_params(**params), limit, stop)
    state, first = ex.prefill(state, row, prompt)
    drawn, asked = [np.asarray(first)], 1
    while asked < limit:
        state, tokens = ex.decode(state, len(prompt) + asked - 1)
        drawn.append(np.asarray(tokens))
        asked += ex.decode_steps
    column = np.concatenate(drawn)[:, row]
    return column[column != NO_TOKEN].tolist()


@pytest.fixture(scope="module")
def ex():
    return make()


@pytest.fixture(scope="module")
def batch_ex():
    return make(batch=4)


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


def test_counts_up_by_hand():
    config, params = successor_params()
    ex = Executor(config, params, "float32", context=64, decode_steps=4)
    assert run(ex, [5, 9], 10) == list(range(10, 20))
    assert run(ex, [22], 4) == [23, 0, 1, 2]
    assert run(ex, [3], 1) == [4]


@pytest.mark.parametrize("stop", [4, 5, 6, 7, 8, 9])
def test_stops_at_the_stop_token_wherever_it_falls_in_a_chunk(stop):
    config, params = successor_params()
    ex = Executor(config, params, "float32", context=64, decode_steps=4)
    assert run(ex, [3], 16, stop=stop) == list(range(4, stop + 1))


def test_rows_stop_independently():
    config, params = successor_params()
    ex = Executor(config, params, "float32", batch=3, context=64, decode_steps=4)
    state = ex.init_state()
    drawn = []
    for row, (start, limit, stop) in enumerate([(3, 9, NO_TOKEN), (10, 9, 13), (20, 2, NO_TOKEN)]):
        state = ex.admit(state, row, sampling.make_params(), limit, stop)
        state, first = ex.prefill(state, row, [start])
        drawn.append(np.asarray(first))
    for _ in range(2):
        state, tokens = ex.decode(state, 20)
        drawn.append(np.asarray(tokens))
    columns = [[t for t in column if t != NO_TOKEN] for column in np.concatenate(drawn).T.tolist()]
    assert columns == [list(range(4, 13)), [11, 12, 13], [21, 22]]
    assert np.asarray(state.done).all()


def test_greedy_equals_the_model_fed_its_own_output(ex):
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(ex.score(tokens)[-1].argmax()))
    assert run(ex, PROMPT, 12) == tokens[len(PROMPT) :]


def test_prefill_equals_score_at_every_length(ex):
    """Across the ladder of chunk sizes, padding and the chunk boundary at 256."""
    long = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 530).tolist()
    logits = ex.score(long)
    for length in (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 511, 512, 513, 530):
        assert run(ex, long[:length], 1) == [int(logits[length - 1].argmax())]


@pytest.mark.parametrize("params", [{}, {"seed": 5, **SAMPLED}], ids=["greedy", "sampled"])
def test_tokens_do_not_depend_on_the_chunk(ex, params):
    expected = run(ex, PROMPT, 33, **params)
    for steps in (1, 3, 16):
        assert run(make(ex.params, decode_steps=steps), PROMPT, 33, **params) == expected


def test_tokens_do_not_depend_on_the_prefill_ladder(ex, monkeypatch):
    expected = run(ex, PROMPT, 20, seed=3, **SAMPLED)
    monkeypatch.setattr(executor, "PREFILL_SIZES", (32, 128))
    assert run(make(ex.params), PROMPT, 20, seed=3, **SAMPLED) == expected


def test_alone_equals_any_row_among_any_neighbours(batch_ex):
    """Bit for bit at one batch size: the cache's row, the logits' row and the key are its own."""
    ex = batch_ex
    request = {"seed": 11, **SAMPLED}
    expected = run(ex, PROMPT, 24, row=0, **request)
    busy = ex.init_state()
    for row in range(4):
        busy = ex.admit(busy, row, sampling.make_params(seed=row, temperature=2.0), 500, NO_TOKEN)
        busy, _ = ex.prefill(busy, row, PROMPT[row:] * (row + 1))
    busy, _ = ex.decode(busy, 140)
    for row in (2, 0, 3):
        # Rows go on, each at its own position, while this one is evicted and admitted anew.
        state = jax.tree.map(jnp.copy, busy)
        state = ex.admit(state, row, sampling.make_params(**request), 24, NO_TOKEN)
        state, first = ex.prefill(state, row, PROMPT)
        drawn = [np.asarray(first)]
        for _ in range(3):
            state, tokens = ex.decode(state, 200)
            drawn.append(np.asarray(tokens))
        column = np.concatenate(drawn)[:, row]
        assert column[column != NO_TOKEN].tolist() == expected


def test_decoding_between_the_chunks_of_a_prompt_changes_nothing(batch_ex):
    """A long prompt may be read while the other rows decode; their steps leave it alone."""
    ex, params = batch_ex, sampling.make_params(seed=1, **SAMPLED)
    prompt = PROMPT * 10
    expected = run(ex, prompt, 10, row=1, seed=1, **SAMPLED)
    state = ex.init_state()
    state = ex.admit(state, 0, sampling.make_params(temperature=1.0), 100, NO_TOKEN)
    state, _ = ex.prefill(state, 0, PROMPT)
    state = ex.admit(state, 1, params, 10, NO_TOKEN)
    for start in (0, 256):
        part = prompt[start : start + 256]
        chunk = np.pad(np.asarray(part, np.int32), (0, padded(len(part)) - len(part)))
        state, first = jax.jit(decode.prefill, static_argnums=0, static_argnames="attend_len")(
            ex._model,
            ex.params,
            state,
            jnp.int32(1),
            jnp.asarray(chunk),
            jnp.int32(len(part)),
            jnp.asarray(start == 256),
            attend_len=512,
        )
        if start == 0:
            state, _ = ex.decode(state, 300)
    drawn = [np.asarray(first)]
    for _ in range(2):
        state, tokens = ex.decode(state, len(prompt) + 8)
        drawn.append(np.asarray(tokens))
    column = np.concatenate(drawn)[:, 1]
    assert column[column != NO_TOKEN].tolist() == expected


def test_penalties_count_prompt_and_output_as_the_law_says():
    """By hand: token 5 says itself with logit sqrt(24) = 4.9, and 6 with 0.3 of that, 1.47."""
    config, params = successor_params()
    head = params["lm_head"].at[5, 5].set(1.0).at[6, 5].set(0.3)
    ex = Executor(config, {**params, "lm_head": head}, "float32", context=64, decode_steps=4)
    assert run(ex, [5], 5) == [5, 5, 5, 5, 5]
    assert run(ex, [5], 4, frequency_penalty=2.0) == [5, 5, 6, 7]  # 4.9, 2.9, then 0.9
    assert run(ex, [5, 5, 5], 4, frequency_penalty=2.0) == [5, 5, 6, 7]  # the output's alone
    assert run(ex, [5], 3, presence_penalty=2.0) == [5, 5, 5]  # 4.9, then 2.9 however often
    weak = params["lm_head"].at[5, 5].set(0.5).at[6, 5].set(0.3)
    ex = Executor(config, {**params, "lm_head": weak}, "float32", context=64, decode_steps=4)
    assert run(ex, [5], 2) == [5, 5]
    assert run(ex, [5], 2, repetition_penalty=2.0) == [6, 7]  # the prompt's 5: 2.45 / 2 < 1.47
    assert run(ex, [5], 2, presence_penalty=1.0) == [5, 6]  # the output's 5: 2.45 - 1 < 1.47


def test_fifty_mixed_requests_compile_each_program_once():
    ex = make()
    rng = np.random.default_rng(0)
    compiled = []
    jax.clear_caches()  # of earlier tests' programs: each of this one's is then lowered anew
    jax.monitoring.register_event_duration_secs_listener(
        # Lowering comes before each compilation, those that the session's cache spares included.
        lambda event, _, **__: compiled.append(event) if "jaxpr_to_mlir" in event else None
    )
    state = ex.init_state()
    for i in range(50):
        length, limit = int(rng.integers(1, 400)), int(rng.integers(1, 60))
        params = {
            "seed": int(rng.integers(2**63)),
            "temperature": float(rng.uniform(0, 5)),
            "top_k": int(rng.integers(1, 50)) if i % 2 else None,
            "top_p": float(rng.uniform(0, 2)) if i % 3 else None,
            "repetition_penalty": float(rng.uniform(0, 2)),
            "frequency_penalty": float(rng.uniform(0, 2)),
            "presence_penalty": float(rng.uniform(0, 2)),
        }
        prompt = rng.integers(0, CONFIG.vocab_size, length).tolist()
        state = ex.admit(state, 0, sampling.make_params(**params), limit, 2 if i % 5 else NO_TOKEN)
        state, _ = ex.prefill(state, 0, prompt)
        for asked in range(1, limit, 8):
            state, _ = ex.decode(state, length + asked - 1)
    jax.monitoring.clear_event_listeners()
    assert len(compiled) == len(ex.compiled.names)  # and nothing outside the executor
    assert set(ex.compiled.names) == {
        "init_state",
        "admit",
        "prefill(16, 256)",
        "prefill(64, 256)",
        "prefill(256, 256)",
        "prefill(16, 512)",
        "prefill(64, 512)",
        "prefill(256, 512)",
        "decode(8, 256)",
        "decode(8, 512)",
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cache_is_donated(dtype):
    """The compiled programs alias every byte of the cache: nothing of it is copied out."""
    ex = make(dtype=dtype)
    run(ex, PROMPT, 9)
    state = ex.init_state()
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(state.cache))
    state_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
    for name in ("admit", "prefill(64, 256)", "decode(8, 256)"):
        aliased = ex._programs[name].memory_analysis().alias_size_in_bytes
        assert aliased == state_bytes > cache_bytes, name


def test_the_cache_is_not_copied():
    """float32, prefill and decode: the temporaries are a small part of what the cache holds."""
    ex = make(batch=2)
    run(ex, PROMPT * 10, 9, row=1)
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(ex.init_state().cache))
    for name in ("prefill(256, 512)", "decode(8, 512)"):
        program = ex._programs[name]
        slots = f"f32[2,2,{ex.capacity},6]"
        copies = [line for line in program.as_text().splitlines() if f"= {slots}" in line]
        assert copies, name  # the shape is spelt as expected
        assert not any(" copy(" in line for line in copies), name
        if name.startswith("decode"):
            assert program.memory_analysis().temp_size_in_bytes < cache_bytes / 4


def test_no_weight_is_captured_as_a_constant(ex):
    """Every weight and every byte of the state comes in as an argument."""
    run(ex, PROMPT, 9)
    ex.score(PROMPT)
    weights = sum(a.nbytes for a in jax.tree.leaves(ex.params))
    state = ex.init_state()
    carried = {"prefill(64, 256)": state, "decode(8, 256)": state, "score(64, 256)": state.cache}
    for name, tree in carried.items():
        expected = weights + sum(a.nbytes for a in jax.tree.leaves(tree))
        assert ex._programs[name].memory_analysis().argument_size_in_bytes >= expected, name


@pytest.mark.parametrize(
    ("length", "slots"),
    [(1, 16), (16, 16), (17, 64), (64, 64), (65, 256), (256, 256), (257, 512), (4096, 4096)],
)
def test_padded(length, slots):
    assert padded(length) == slots
