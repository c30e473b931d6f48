"""Which plan a machine gets, and that each plan gives the same answers."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import llama
from llama_jax.config import ModelConfig
from llama_jax.decode import plan, sampling
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import Plan, accelerator_plan, choose_plan
from llama_jax.decode.state import make_admission
from llama_jax.engine.engine import Engine
from llama_jax.nn.cache import init_cache
from llama_jax.nn.kernel_choice import NATIVE, KernelChoice
from llama_jax.nn.transformer import Transformer, forward, param_shapes
from tests.helpers.models import PURE_MARKS

CONFIG = ModelConfig(
    vocab_size=1000,
    dim=256,
    ffn_dim=704,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=640,
)
MOVES = ("copy", "convert", "transpose")
CPU_PLANS = [
    ("float32", Plan("float32", "float32", KernelChoice("plain", "blocks"))),
    ("float16", Plan("float16", "float16", KernelChoice("blocked", "blocks"))),
    ("float16", Plan("float32", "float16", KernelChoice("plain", "blocks"))),
    ("bfloat16", Plan("bfloat16", "uint16", KernelChoice("two_rows", "blocks"))),
    ("float32", Plan("float32", "float32", NATIVE)),
    ("float16", Plan("float16", "float16", NATIVE)),
    ("bfloat16", Plan("bfloat16", "uint16", NATIVE)),
]

jit_forward = jax.jit(forward, static_argnums=0, static_argnames="attend_len")


@pytest.fixture
def this_cpu(monkeypatch):
    """Say what this machine is to have."""

    def set_up(*, kernels, memory=2**40):
        monkeypatch.setattr(plan, "default_device", lambda: types.SimpleNamespace(platform="cpu"))
        monkeypatch.setattr(plan, "has_kernels", lambda: kernels)
        monkeypatch.setattr(plan, "total_memory", lambda: memory)

    return set_up


def test_with_kernels_nothing_is_widened(this_cpu):
    this_cpu(kernels=True)
    sizes = (16, 32, 64, 128)
    assert choose_plan(CONFIG, "float32") == Plan("float32", "float32", NATIVE, sizes)
    assert choose_plan(CONFIG, "float16") == Plan("float16", "float16", NATIVE, sizes)
    assert choose_plan(CONFIG, "bfloat16") == Plan("bfloat16", "uint16", NATIVE, sizes)


def test_without_kernels_float16_is_widened_where_it_fits(this_cpu):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(CONFIG)))
    this_cpu(kernels=False, memory=10 * parameters)
    assert choose_plan(CONFIG, "float16").weights == "float32"
    this_cpu(kernels=False, memory=9 * parameters)
    assert choose_plan(CONFIG, "float16").weights == "float16"
    projections = {"float16": "blocked", "bfloat16": "two_rows", "float32": "plain"}
    for dtype, projection in projections.items():
        fast, strict = (choose_plan(CONFIG, dtype, word).kernels for word in ("fast", "strict"))
        assert fast == KernelChoice(projection, "blocks")
        projection = "plain" if projection == "two_rows" else projection
        assert strict == KernelChoice(projection, "rows", "plain", "blocks", 8)


def test_an_accelerator_runs_ahead(monkeypatch):
    monkeypatch.setattr(plan, "default_device", lambda: types.SimpleNamespace(platform="gpu"))
    chosen = choose_plan(CONFIG, "bfloat16")
    assert chosen.kernels == KernelChoice("plain", "tree", "plain", "whole", 8)
    assert choose_plan(CONFIG, "bfloat16", "fast").kernels.attention == "whole"
    assert (chosen.weights, chosen.cache) == ("bfloat16", "bfloat16")
    assert chosen.max_in_flight == 2


def make(dtype, plan, request=None, batch=1):
    """An executor of one layer: what a plan decides is equal in all."""
    if plan.kernels.projection == "native":
        request.getfixturevalue("native_kernels")
    config, rng = dataclasses.replace(CONFIG, num_layers=1), np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, a.shape[-1] ** -0.5, a.shape), dtype),
        param_shapes(config),
    )
    return Executor(config, params, dtype, batch=batch, context=640, plan=plan)


TOKENS = np.random.default_rng(1).integers(0, 1000, 300).tolist()


@pytest.fixture(scope="module")
def expected_logits():
    """Those of a dtype's weights, by products and a cache in float32."""
    _, reference = CPU_PLANS[0]
    return functools.cache(lambda dtype: make(dtype, reference).logits(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "plan"),
    [*CPU_PLANS[1:], *(("float32", accelerator_plan(name, "float32")) for name in ("gpu", "tpu"))],
)
def test_every_plan_computes_the_same_logits(dtype, plan, expected_logits, request):
    got, expected = make(dtype, plan, request).logits(TOKENS), expected_logits(dtype)
    error = np.sqrt(np.mean((got - expected) ** 2)) / expected.std()
    assert error < {"float32": 1e-6, "float16": 5e-4, "bfloat16": 1e-2}[dtype]


def loop_instructions(hlo):
    """The instructions that run inside a while loop, as (opcode, dimensions)."""
    computations, name = {}, None
    for line in hlo.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = found[1]
            computations[name] = []
        elif name and "=" in line:
            computations[name].append(line)
    called = re.compile(
        r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    )
    todo = [
        re.search(r"body=%?([\w.-]+)", line)[1]
        for lines in computations.values()
        for line in lines
        if " while(" in line
    ]
    assert todo, "no loop"
    seen = set()
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += [c for line in computations[name] for c in called.findall(line)]
    pattern = re.compile(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(")
    for name in seen:
        for line in computations[name]:
            if found := pattern.search(line):
                yield found[2], tuple(int(n) for n in found[1].split(",") if n)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize(
    ("dtype", "plan"),
    [pytest.param(*each, marks=PURE_MARKS) for each in CPU_PLANS[:4]] + CPU_PLANS[4:],
)
def test_the_token_loop_copies_and_converts_no_weight_and_no_cache(dtype, plan, batch, request):
    """The compiled program itself: XLA would widen 16-bit weights, and copy bfloat16 caches."""
    if jax.default_backend() != "cpu":
        pytest.skip("plans for CPUs")
    ex = make(dtype, plan, request, batch)
    new = make_admission(sampling.make_params(), [1, 2, 3], CONFIG.vocab_size, limit=20)
    state = ex.admit(ex.init_state(), 0, new)
    rows = [0] if batch == 1 else [0, 2]  # two of three, where the plan computes as few as that
    state, _, _ = ex.decode(state, rows, 3)
    (name,) = (n for n in ex.compiled.names if n.startswith("decode"))
    large = {a.shape for a in jax.tree.leaves((ex.params, state.cache)) if a.ndim > 1}
    assert {(256, 256), (704, 256), (batch, 2, 768, 64)} <= large
    sizes = {int(np.prod(shape)) for shape in large}
    moved = [
        (opcode, shape)
        for opcode, shape in loop_instructions(ex.programs[name].as_text())
        if opcode in MOVES and np.prod(shape) in sizes
    ]
    assert moved == []
    # Nor is anything large compiled in.
    hlo = ex.programs[name].as_text()
    constants = re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", hlo)
    assert constants
    assert max(np.prod([int(n) for n in c.split(",") if n]) for c in constants) < 100_000
    # Nor before the loop: what it needs beside its arguments is small.
    temporary = ex.programs[name].memory_analysis().temp_size_in_bytes
    weights = sum(a.nbytes for a in jax.tree.leaves(ex.params))
    assert temporary < 0.15 * weights * batch


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", pytest.param("native", marks=pytest.mark.exhaustive)])
def test_the_demo_answers_by_every_plan(form, request):
    if form == "native":
        request.getfixturevalue("native_kernels")
    llm = llama.Llama.load()
    forms = NATIVE if form == "native" else KernelChoice("plain", "blocks")
    changed = llm.executor.plan._replace(kernels=forms)
    llm.executor = Executor(llm.config, llm.executor.params, "float32", context=512, plan=changed)
    llm.engine = Engine(llm.executor, llm.tokenizer)
    result = llm.generate(prompt="What is the capital of France?", temperature=0)
    assert result.response.strip() == "The capital of France is Paris."
    assert llm.executor.compiled.names  # it was this plan that answered


@pytest.mark.parametrize(
    ("width", "layers"), [(256, 1), pytest.param(1024, 2, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_with_kernels_a_logit_has_the_same_bits_however_it_is_computed(
    native_kernels, dtype, width, layers
):
    """Alone or in a batch of any size, in a prompt, in chunks of any size, or token by token."""
    config = dataclasses.replace(CONFIG, dim=width, num_layers=layers, num_heads=8, num_kv_heads=4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, a.shape[-1] ** -0.5, a.shape), dtype),
        param_shapes(config),
    )
    model = Transformer(config, jnp.dtype(dtype), NATIVE)
    tokens = rng.integers(0, 1000, (8, 24))
    cache_dtype = {"bfloat16": "uint16"}.get(dtype, dtype)

    def logits(batch, chunk):
        cache, parts = init_cache(config, batch, 64, cache_dtype), []
        for start in range(0, 24, chunk):
            part = jnp.asarray(tokens[:batch, start : start + chunk], jnp.int32)
            starts = jnp.full(batch, start, jnp.int32)
            got, cache = jit_forward(model, params, part, starts, cache, attend_len=64)
            parts.append(np.asarray(got[0]))
        return np.concatenate(parts)

    expected = logits(1, 1)
    for batch, chunk in ((1, 24), (1, 5), (3, 1), (8, 1), (8, 24)):
        np.testing.assert_array_equal(logits(batch, chunk), expected, err_msg=f"{batch} {chunk}")
