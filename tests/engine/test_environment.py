"""Equal for what decides the tokens alike, another for anything that may not."""

import copy
import dataclasses
import re
import shutil

import jax
import pytest

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine import environment as module
from llama_jax.engine.environment import code_digest, compiler_flags, describe
from llama_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from llama_jax.weights.shards import tensors

DECIDING = (
    "config.py",
    "text/chat.py",
    "text/tokenizer.py",
    "nn/ops.py",
    "nn/cpu_kernels.cc",
    "nn/cpu_registers.h",
    "nn/cpu_tiles.h",
    "weights/checkpoint.py",
    "decode/sampling.py",
    "engine/scheduler.py",
)


@pytest.fixture(scope="module")
def demo():
    return load_checkpoint(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def llm(demo):
    return Llama(demo)


@pytest.fixture
def now(demo, llm):
    """Return the fingerprint of the demo model under what is set by now."""
    return lambda: describe(demo, llm.executor).fingerprint


def test_equal_for_an_equal_configuration(demo, llm, now, tmp_path):
    assert re.fullmatch("fp_[0-9a-f]{16}", now())
    assert now() == llm.engine.fingerprint == Llama.load(DEMO_CHECKPOINT).engine.fingerprint
    for sizes in ({"slots": 2}, {"context": 64}):  # which may decide a bit, or not
        equal = Llama(demo, **sizes).engine.fingerprint == now()
        on_cpu = llm.executor.device.platform == "cpu"
        assert equal == (on_cpu and llm.executor.plan.slots_invariant)
    fast = Llama(demo, determinism="fast")
    assert fast.engine.fingerprint.startswith("fp_fast_") != fast.executor.plan.batch_invariant
    save_checkpoint(
        tmp_path / "copy", tensors(demo.params), demo.config, tokenizer=demo.tokenizer.read_bytes()
    )
    assert Llama.load(tmp_path / "copy").engine.fingerprint == now()


def test_another_for_each_part(demo, llm, now, tmp_path, tokenizer, monkeypatch):
    plain = now()
    norm = demo.params | {"final_norm": 2 * demo.params["final_norm"]}
    save_checkpoint(
        tmp_path / "weights", tensors(norm), demo.config, tokenizer=demo.tokenizer.read_bytes()
    )
    save_checkpoint(
        tmp_path / "tokenizer", tensors(demo.params), demo.config, tokenizer=tokenizer.read_bytes()
    )
    save_checkpoint(tmp_path / "without", tensors(demo.params), demo.config)
    checkpoints = [load_checkpoint(tmp_path / n) for n in ("weights", "tokenizer", "without")]
    checkpoints += [
        dataclasses.replace(demo, config=dataclasses.replace(demo.config, rope_theta=5e5)),
        *(dataclasses.replace(demo, dtype=dtype) for dtype in ("float16", "bfloat16")),
    ]
    others = [describe(checkpoint, llm.executor).fingerprint for checkpoint in checkpoints]
    changed = copy.copy(llm.executor)
    changed.plan = llm.executor.plan._replace(decode_steps=4)
    others.append(describe(demo, changed).fingerprint)
    for name, value in {
        "SAMPLER_VERSION": 3,
        "__version__": "0",
        "code_digest": lambda package: "other",
        "instruction_set": lambda: "other",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            others.append(now())
    if not llm.executor.plan.batch_invariant:
        others.pop()  # the instruction set is XLA's
    assert len({plain, *others}) == 1 + len(others)
    assert now() == plain


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs alone")
def test_another_for_other_instructions_where_xla_compiles_for_them(demo, monkeypatch):
    monkeypatch.setattr("llama_jax.decode.plan.has_kernels", lambda: False)
    executor = Llama(demo).executor
    plain = describe(demo, executor).fingerprint
    assert describe(demo, executor).fingerprint == plain
    monkeypatch.setattr(module, "vector_instructions", lambda: ["other"])
    assert describe(demo, executor).fingerprint != plain


@pytest.mark.parametrize("name", DECIDING)
def test_another_for_other_code(name, tmp_path):
    package = shutil.copytree(module.PACKAGE, tmp_path / "package")
    code_digest.cache_clear()
    assert code_digest(package) == code_digest(module.PACKAGE)
    with (package / name).open("a") as file:
        file.write("\n")
    code_digest.cache_clear()
    assert code_digest(package) != code_digest(module.PACKAGE)


def test_the_same_for_other_code_of_the_server(tmp_path):
    package = shutil.copytree(module.PACKAGE, tmp_path / "package")
    shutil.rmtree(package / "server")
    assert code_digest(package) == code_digest(module.PACKAGE)


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_another_for_other_flags_of_the_compiler(now, variable, monkeypatch, tmp_path):
    found = {now()}
    for flags in ("--xla_a=1", "--xla_a=2", "--xla_a=2 --xla_b=1", "--xla_b"):
        monkeypatch.setenv(variable, flags)
        found.add(now())
    assert len(found) == 5


def test_the_same_for_flags_that_mean_the_same(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_b=1\n--xla_a=2\n")
    harmless = "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=4"
    for flags in ("--xla_a=2 --xla_b=1", "--xla_a=1 --xla_b=1 --xla_a=2", str(file)):
        monkeypatch.setenv("XLA_FLAGS", flags)
        assert compiler_flags("XLA_FLAGS") == {"--xla_a": "2", "--xla_b": "1"}
    monkeypatch.setenv("XLA_FLAGS", harmless)
    assert compiler_flags("XLA_FLAGS") == {}


def test_another_for_settings_that_decide_bits_and_for_no_other(now):
    plain = now()
    for name, value in {
        "jax_disable_most_optimizations": True,
        "jax_optimization_level": "O1",
    }.items():
        before = jax.config.values[name]
        jax.config.update(name, value)
        assert now() != plain, name
        jax.config.update(name, before)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        assert now() == plain
