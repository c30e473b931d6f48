"""The wheel holds everything, and works away from the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.helpers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long]

NOT_PACKAGED = (".git", "benchmarks", "build", "tests", "tools", "*.egg-info", "*.so", ".venv")


def run(*command, cwd: pathlib.Path, **variables: str) -> str:
    """Run a command that sees nothing of the checkout; return its stdout."""
    hidden = ("PYTHONPATH", "LLAMA_JAX_CHECKPOINT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd: pathlib.Path, **variables: str) -> None:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    run(*command, cwd=cwd, **variables)


def build_wheel(source: pathlib.Path, folder: pathlib.Path, **variables: str) -> pathlib.Path:
    options = ("--no-build-isolation", "--no-deps", "-w", folder)
    pip("wheel", *options, source, cwd=source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source") / "llama_jax"
    ignore = shutil.ignore_patterns(*NOT_PACKAGED)
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment with the wheel, and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/*/site-packages")
    # The .pth files of that folder, as of an editable llama_jax, are not read from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def packaged(path: pathlib.Path) -> set[str]:
    """Return the names in a wheel, without its metadata."""
    with zipfile.ZipFile(path) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    expected = {
        file.relative_to(ROOT).as_posix()
        for package in ("llama_jax", "convert")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".so")
    }
    expected |= {f"convert/configs/{file.name}" for file in (ROOT / "configs").glob("*.json")}
    expected -= {"convert/configs/README.md"}
    names = packaged(wheel)
    assert {name for name in names if not name.endswith(".so")} == expected
    for name in (
        "convert/__main__.py",
        "convert/configs/llama-2-7b.json",
        "llama_jax/card/input.json",
        "llama_jax/demo/checkpoint/manifest.json",
        "llama_jax/demo/checkpoint/params/00000/_METADATA",
        "llama_jax/demo/checkpoint/tokenizer.model",
        "llama_jax/demo/selftest.jsonl",
        "llama_jax/py.typed",
        "llama_jax/server/page/index.html",
    ):
        assert name in names
    with zipfile.ZipFile(wheel) as file:
        for config in (ROOT / "configs").glob("*.json"):
            assert file.read(f"convert/configs/{config.name}") == config.read_bytes()


def test_an_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    code = "from setuptools import build_meta; print(build_meta.build_sdist({!r}))"
    name = run(sys.executable, "-c", code.format(str(tmp_path)), cwd=source).splitlines()[-1]
    run("tar", "-xzf", name, cwd=tmp_path)
    folder = tmp_path / name.removesuffix(".tar.gz")
    for kernels in ("cpu_kernels.cc", "cpu_registers.h", "cpu_tiles.h"):
        path = f"llama_jax/nn/{kernels}"
        assert (folder / path).read_bytes() == (source / path).read_bytes()
    for built in (source / "build").glob("lib.*/llama_jax/nn/*.so"):  # not compiled once more
        target = folder / built.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)
    assert packaged(build_wheel(folder, tmp_path / "wheel")) == packaged(wheel)


def test_a_wheel_for_arm_is_cross_built(source, arm_compiler, tmp_path):
    """With the variables of CONTRIBUTING.md, for this Python's version."""
    suffix = f".{sys.implementation.cache_tag}-aarch64-linux-gnu.so"
    wheel = build_wheel(
        source,
        tmp_path,
        _PYTHON_HOST_PLATFORM="linux-aarch64",
        SETUPTOOLS_EXT_SUFFIX=suffix,
        CC=arm_compiler.replace("g++", "gcc"),
        CXX=arm_compiler,
    )
    assert wheel.name.endswith("-linux_aarch64.whl")
    [name] = (name for name in packaged(wheel) if name.endswith(".so"))
    assert name == f"llama_jax/nn/_cpu_kernels_neon{suffix}"
    with zipfile.ZipFile(wheel) as file:
        header = file.read(name)[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:], "little") == 183  # EM_AARCH64


def test_the_selftest_passes_from_the_wheel(installed, tmp_path):
    *parts, verdict = run(installed / "llama-jax", "selftest", cwd=tmp_path).splitlines()[1:]
    assert verdict == "PASS"
    assert [part.split("  ")[0] for part in parts] == [
        "8 slots, other order",
        "in one pass",
        "1 slot",
    ]


def test_the_wheel_works_away_from_the_checkout(installed, tmp_path):
    code = """
import convert, llama_jax
from convert import published
from llama_jax import Llama, ModelConfig
from llama_jax.card import contract
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server import page

print(llama_jax.__file__)
print(convert.__file__)
config = ModelConfig.load(published._PRESETS / "llama-2-7b.json")
assert published.differences(config) == []
llama = Llama.load(DEMO_CHECKPOINT)
print(llama.generate(prompt="What is the capital of France?", temperature=0).response)
"""
    ours, converters, text = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    for file in (ours, converters):
        assert pathlib.Path(file).is_relative_to(installed.parent)
    assert "Paris" in text
    assert list(tmp_path.iterdir()) == []


def version() -> str:
    from llama_jax.version import __version__

    return f"llama_jax {__version__}"


def test_the_installed_converter_tells_its_version(installed, tmp_path):
    said = run(installed / "python", "-m", "convert", "--version", cwd=tmp_path)
    assert said.strip() == version()


def test_the_command_tells_its_version(installed, tmp_path):
    assert version() in run(installed / "llama-jax", "--version", cwd=tmp_path)


def test_the_command_answers_a_prompt(installed, tmp_path):
    question = "--prompt=What is the capital of France?"
    text = run(installed / "llama-jax", question, "--temperature=0", cwd=tmp_path)
    assert text.strip() == "The capital of France is Paris."
