"""Run a notebook from nothing, and store what it prints and draws.

    python -m tools.run_notebook notebooks/quickstart.ipynb

It runs in a copy of the checkout, in an environment of its own that has the packages of this one
but llama_jax: that is what its cells install. Nothing is downloaded.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any
from unittest import mock

import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_COPIED = (
    ".git",
    ".*_cache",
    ".venv*",
    "__pycache__",
    "build",
    "*.egg-info",
    "*.so",
    "shared",
    "tests",
)
OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip means: build with the setuptools and jaxlib of here
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
"""How pip installs from packages that are there, so that the cell is the one that users run."""
_HIDDEN = ("LLAMA_JAX_CHECKPOINT", "PYTHONPATH", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Variables of this process that would change what a notebook does."""


def copy_checkout(folder: pathlib.Path) -> pathlib.Path:
    """Copy the checkout, without what was built in it; return the copy."""
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    return shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignore)


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    """Make a virtual environment with this one's packages but for llama_jax; return its Python."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/*/site-packages")
    # The .pth files of that folder, as of an editable llama_jax, are not read from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin" / "python"


def execute(
    notebook: Any, folder: pathlib.Path, python: pathlib.Path | None = None, **variables: str
) -> None:
    """Run a notebook; its cells have their outputs then.

    Args:
        notebook: as nbformat reads it.
        folder: where it runs.
        python: the interpreter; None: this one, and llama_jax from the checkout.
        **variables: for its environment.

    Raises:
        CellExecutionError: a cell failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    environment["NO_PROXY"] = environment["no_proxy"] = "127.0.0.1"
    if python is None:
        python = pathlib.Path(sys.executable)
        environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            environment[variable] = str(pathlib.Path(name, variable.lower()))
        client = nbclient.NotebookClient(
            notebook,
            kernel_manager_class=_kernels_of(python),
            timeout=300,
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
        )
        with mock.patch.dict(os.environ, environment | variables, clear=True):
            client.execute()


def _kernels_of(python: pathlib.Path) -> type[AsyncKernelManager]:
    """Return what starts kernels by an interpreter."""
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python")

    class Manager(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            """In place of one that is installed."""
            return spec

    return Manager


def tidy(notebook: Any) -> None:
    """Leave out what went to stderr, warnings of this machine, and join the pieces of a stream."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tidied: list[Any] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if output.get("name") and tidied and tidied[-1].get("name"):
                tidied[-1].text += output.text
            else:
                tidied.append(output)
        cell.outputs = tidied


def dump(notebook: Any) -> str:
    """Return the text of a notebook's file, as `json` writes it: a change is a small diff."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Store the outputs of the notebook that the command line names."""
    parser = argparse.ArgumentParser(description="Run a notebook and store its outputs.")
    parser.add_argument("notebook", type=pathlib.Path)
    path = parser.parse_args().notebook
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checkout = copy_checkout(folder)
        execute(notebook, checkout / "notebooks", make_environment(folder), **OFFLINE)
    tidy(notebook)
    path.write_text(dump(notebook), "utf-8")


if __name__ == "__main__":
    main()
