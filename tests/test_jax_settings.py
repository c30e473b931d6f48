"""The settings of JAX that an application has made change no token and no bit of a logit."""

import contextlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from llama_jax import InputError, Llama
from llama_jax.jax_settings import default_device
from tests.helpers import ROOT
from tests.helpers.commands import PARIS, PARIS_ANSWER, run_py

ASK = {
    "prompt": "Tell me a story about a llama.",
    "seed": 2**40 + 7,
    "temperature": 1.5,
    "top_k": 40,
    "max_tokens": 12,
    "logprobs": 2,
}
IDS = [1, 2, 3, 500]

PRINT = f"""
import sys, jax
changes = [(name, eval(value, {{"jax": jax}})) for name, value in
           (argument.split("=", 1) for argument in sys.argv[2:])]
change = lambda: [jax.config.update(*pair) for pair in changes]
if sys.argv[1] == "before": change()
from llama_jax import Llama
llm = Llama.load(slots=2)
if sys.argv[1] == "after": change()
result = llm.generate(**{ASK})
print(result.tokens, result.logprobs, result.fingerprint, llm.logits({IDS}).tobytes().hex())
assert all(jax.config.values[name] == value for name, value in changes)
"""
"""A program that prints what the demo model gives, with settings made before or after loading."""


def outputs(llm):
    result = llm.generate(**ASK)
    return result.tokens, result.logprobs, result.fingerprint, llm.logits(IDS).tobytes()


@pytest.fixture(scope="module")
def plain():
    return outputs(Llama.load())


SETTINGS = {
    "64-bit types": lambda: jax.enable_x64(True),
    "no transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "no jit, other precision": lambda: together(
        jax.disable_jit(), jax.default_matmul_precision("bfloat16")
    ),
}


@contextlib.contextmanager
def together(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_setting_made_before_loading_changes_nothing(setting, plain):
    with setting():
        assert outputs(Llama.load()) == plain


def test_settings_made_after_loading_change_nothing(plain):
    llm = Llama.load()
    with together(*(setting() for setting in SETTINGS.values())):
        assert outputs(llm) == plain


def test_one_function_reads_from_the_device():
    """On a CPU no guard refuses it, so the test of transfers above says nothing there."""
    sources = (ROOT / "llama_jax").rglob("*.py")
    users = {path.name for path in sources if "device_get(" in path.read_text("utf-8")}
    assert users == {"jax_settings.py"}


def test_logits_have_32_bits_for_a_program_that_computes_with_64():
    with jax.enable_x64(True):
        assert Llama.load().logits(IDS).dtype == np.float32
        assert jax.numpy.arange(3.0).dtype == np.float64, "the application's own setting"


def printed(when, *settings, **environment):
    command = [sys.executable, "-c", PRINT, when, *settings]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed_plain():
    return printed("never")


OF_THE_PROCESS = {
    "arithmetic": (
        "jax_enable_x64=True",
        "jax_numpy_dtype_promotion='strict'",
        "jax_numpy_rank_promotion='raise'",
        "jax_default_matmul_precision='highest'",
        "jax_threefry_partitionable=False",
        "jax_default_prng_impl='rbg'",
        "jax_softmax_custom_jvp=True",
    ),
    "no jit": (
        "jax_disable_jit=True",
        "jax_default_matmul_precision='tensorfloat32'",
        "jax_default_prng_impl='unsafe_rbg'",
    ),
    "checks": (
        "jax_debug_nans=True",
        "jax_debug_infs=True",
        "jax_check_tracer_leaks=True",
        "jax_transfer_guard='disallow'",
        "jax_default_device='cpu'",
    ),
    "logs": (
        "jax_transfer_guard='log'",
        "jax_log_compiles=True",
        "jax_explain_cache_misses=True",
        "jax_array_garbage_collection_guard='log'",
        "jax_default_device=jax.devices()[0]",
    ),
}
"""Each set goes into one process, which takes several seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.exhaustive), "after"])
@pytest.mark.parametrize("settings", OF_THE_PROCESS.values(), ids=OF_THE_PROCESS.keys())
def test_settings_of_the_process_change_nothing(when, settings, printed_plain):
    assert printed(when, *settings) == printed_plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "1"),
        ("JAX_ENABLE_COMPILATION_CACHE", "0"),
        ("JAX_COMPILATION_CACHE_DIR", "/proc/nothing/here"),
        ("JAX_PLATFORMS", "cpu"),
        ("JAX_TRACEBACK_FILTERING", "off"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=4"),
    ],
)
def test_a_variable_changes_nothing(name, value, printed_plain):
    assert printed("never", **{name: value}) == printed_plain


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_stays_on_the_device_that_was_the_default_at_its_load(when, printed_plain):
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert printed(when, "jax_default_device=jax.devices()[2]", **four) == printed_plain


def test_the_default_device_is_the_one_that_is_set():
    first = jax.local_devices()[0]
    assert default_device() == first
    for chosen in (first, first.platform):
        with jax.default_device(chosen):
            assert default_device() == first


def test_a_device_that_is_not_there_is_one_line():
    absent = "tpu" if jax.default_backend() != "tpu" else "gpu"
    with (
        jax.default_device(absent),
        pytest.raises(InputError, match=f"no device for .*jax_default_device='{absent}'") as error,
    ):
        Llama.load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "platforms",
    [
        pytest.param("cuda", marks=pytest.mark.slow),
        pytest.param("tpu", marks=pytest.mark.exhaustive),
        "x",
    ],
)
def test_a_platform_that_is_not_there_is_one_line_and_exit_2(platforms):
    if jax.default_backend() != "cpu":
        pytest.skip("the platform may be there")
    done = run_py(PARIS, env=os.environ | {"JAX_PLATFORMS": platforms})
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: JAX has no device for jax_platforms='{platforms}'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_line_works_in_64_bits():
    done = run_py(PARIS, "--temperature=0", env=os.environ | {"JAX_ENABLE_X64": "1"})
    assert done.stdout == PARIS_ANSWER, done.stderr
