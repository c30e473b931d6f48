"""Where there are no kernels, one line names the cause and its remedy."""

import importlib.machinery
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from llama_jax.nn import missing_kernels
from tests.helpers import ROOT

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An x86-64 machine with g++, and a checkout without kernels in use; nothing is installed."""
    root = tmp_path / "checkout"
    (root / "llama_jax" / "nn").mkdir(parents=True)
    (root / "setup.py").touch()
    monkeypatch.setattr(missing_kernels, "_FOLDER", root / "llama_jax" / "nn")
    monkeypatch.setattr(missing_kernels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(missing_kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(missing_kernels.sys, "path", [str(root)])
    monkeypatch.delenv("CXX", raising=False)
    return root


def install(site: pathlib.Path, *, kernels: bool, suffix: str = SUFFIX) -> None:
    """Make a folder as that of an installed wheel."""
    (site / "llama_jax" / "nn").mkdir(parents=True)
    if kernels:
        (site / "llama_jax" / "nn" / f"_cpu_kernels_avx2{suffix}").touch()


def test_checkout_that_hides_an_installation_with_kernels(checkout, tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    install(site, kernels=True)
    monkeypatch.setattr(missing_kernels.sys, "path", [str(checkout), str(site)])
    assert missing_kernels.explain_absence() == (
        f"the CPU kernels are in {site}, but this process runs {checkout}, which has none: "
        f"run `pip install -e .` in {checkout}"
    )


def test_checkout_that_hides_another_checkout_with_kernels(checkout, tmp_path, monkeypatch):
    """As `pip install -e` records it: its folder is not on the path."""
    site, other = tmp_path / "site-packages", tmp_path / "other checkout"
    install(other, kernels=True)
    info = site / "llama_jax-0.2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: llama_jax\nVersion: 0.2.0\n")
    url = {"url": other.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(url))
    monkeypatch.setattr(missing_kernels.sys, "path", [str(checkout), str(site)])
    assert missing_kernels.explain_absence().startswith(f"the CPU kernels are in {other}, but ")


@pytest.mark.parametrize(
    "installed", [{"kernels": False}, {"kernels": True, "suffix": ".cpython-299-other.so"}]
)
def test_installation_without_usable_kernels_is_not_the_cause(
    checkout, tmp_path, monkeypatch, installed
):
    site = tmp_path / "site-packages"
    install(site, **installed)
    monkeypatch.setattr(missing_kernels.sys, "path", [str(checkout), str(site)])
    assert "were not built" in missing_kernels.explain_absence()


def test_no_compiler(checkout, monkeypatch):
    monkeypatch.setattr(missing_kernels.shutil, "which", lambda name: None)
    assert missing_kernels.explain_absence() == (
        "the CPU kernels were not built, for there is no C++ compiler: install g++ "
        f"(apt install g++), then run `pip install -e .` in {checkout}"
    )


def test_compiler_that_is_there_is_not_blamed(checkout, monkeypatch):
    monkeypatch.setenv("CXX", "ccache clang++-19")
    assert missing_kernels.explain_absence() == (
        "the CPU kernels were not built, though there is a C++ compiler (/usr/bin/ccache): "
        f"run `pip install -e .` in {checkout}; with -v it shows what the compiler says"
    )


@pytest.mark.parametrize("machine", ["armv7l", "riscv64", "ppc64le", ""])
def test_another_cpu(checkout, monkeypatch, machine):
    monkeypatch.setattr(missing_kernels.platform, "machine", lambda: machine)
    line = missing_kernels.explain_absence()
    assert f"and this one is {machine or 'unknown'}: JAX computes in their place" in line
    assert "pip" not in line


@pytest.mark.parametrize("machine", ["amd64", "aarch64", "arm64"])
def test_every_cpu_with_kernels_can_have_them_built(checkout, monkeypatch, machine):
    monkeypatch.setattr(missing_kernels.platform, "machine", lambda: machine)
    assert "run `pip install -e .` in" in missing_kernels.explain_absence()


def test_installed_package_is_to_be_installed_again(checkout):
    (checkout / "setup.py").unlink()
    assert missing_kernels.explain_absence().endswith(
        "install llama_jax again; with -v it shows what the compiler says"
    )


def test_run_py_of_a_checkout_without_kernels(native_kernels, tmp_path):
    """The kernels of this environment are installed, but not in that checkout."""
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "llama_jax", checkout / "llama_jax", ignore=ignore)
    for name in ("run.py", "setup.py"):
        shutil.copy(ROOT / name, checkout)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, checkout / "run.py", "--estimate"],
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "kernels" in line]
    assert line.startswith("warning: the CPU kernels are in ")
    assert line.endswith(f"which has none: run `pip install -e .` in {checkout}")
