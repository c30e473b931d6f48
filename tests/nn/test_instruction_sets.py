"""Which kernels are built for which CPU, and that NEON's have the bits of AVX2's."""

import os
import pathlib
import runpy
import subprocess
import sysconfig

import pytest
import setuptools

from llama_jax.nn import cpu_kernels
from tests.helpers import ROOT

DRIVER = pathlib.Path(__file__).with_name("cpu_kernels_digests.cc")
X86_64 = {"avx2", "avx512", "avx512bf16", "amx"}


@pytest.fixture
def built_for(monkeypatch):
    """Return a function: what setup.py builds for a platform, by the name of the set."""

    def find(platform: str) -> dict[str, setuptools.Extension]:
        found = []
        monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
        monkeypatch.setattr(setuptools, "setup", lambda ext_modules: found.extend(ext_modules))
        runpy.run_path(str(ROOT / "setup.py"))
        return {one.name.removeprefix("llama_jax.nn._cpu_kernels_"): one for one in found}

    monkeypatch.setenv("ARCHFLAGS", "")  # which setup.py may set
    monkeypatch.delenv("ARCHFLAGS")
    return find


@pytest.mark.parametrize(
    ("platform", "names"),
    [
        ("linux-x86_64", X86_64),
        ("macosx-10.13-x86_64", X86_64),
        ("linux-aarch64", {"neon"}),
        ("macosx-11.0-arm64", {"neon"}),
        ("linux-ppc64le", set()),
        ("win32", set()),
    ],
)
def test_what_is_built_for_a_platform(built_for, platform, names):
    assert built_for(platform).keys() == names
    assert names <= set(cpu_kernels.INSTRUCTION_SETS)


@pytest.mark.parametrize(("machine", "names"), [("arm64", {"neon"}), ("x86_64", X86_64)])
def test_a_python_for_two_kinds_of_cpu_builds_for_this_one(built_for, monkeypatch, machine, names):
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert built_for("macosx-10.9-universal2").keys() == names
    assert os.environ["ARCHFLAGS"] == f"-arch {machine}"


def build(compiler: str, library: setuptools.Extension, program: pathlib.Path) -> None:
    """Compile the driver as a library of kernels is compiled."""
    flags = [*library.extra_compile_args, "-Wall", "-Wextra", "-Werror", "-static"]
    run(compiler, *flags, DRIVER, "-o", program)


def run(*command) -> list[str]:
    """Return the lines that a program prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(
    sysconfig.get_platform() != "linux-x86_64", reason="needs AVX2, to compare with"
)
def test_neon_has_the_bits_of_avx2(built_for, arm_compiler, arm_emulator, tmp_path):
    """On an emulated CPU: each kernel in each type, at odd sizes, of special values too."""
    build("c++", built_for("linux-x86_64")["avx2"], tmp_path / "avx2")
    build(arm_compiler, built_for("linux-aarch64")["neon"], tmp_path / "neon")
    avx2, neon = run(tmp_path / "avx2"), run(arm_emulator, tmp_path / "neon")
    assert len(set(avx2)) == len(avx2) > 500
    assert [line for line in neon if line not in avx2] == []
    assert neon == avx2
