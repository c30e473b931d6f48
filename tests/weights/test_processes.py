"""Two processes load a checkpoint onto one mesh: each reads its part, and they fail together."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.weights.checkpoint import save_checkpoint
from llama_jax.weights.shards import by_path, tensors
from tests.helpers import ROOT
from tests.helpers.models import SMALL, random_params

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts bytes in /proc/self/io")

LARGE = dataclasses.replace(
    SMALL, vocab_size=2000, dim=1024, ffn_dim=2816, num_heads=8, num_kv_heads=4
)
PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, each with its arrays."""
    folder = tmp_path_factory.mktemp("processes")
    small = jax.tree.map(np.array, random_params(SMALL))
    other = jax.tree.map(np.copy, small)
    other["final_norm"] *= 2
    beyond = jax.tree.map(np.copy, small)
    beyond["layer_1"]["attention"]["v"][-1, 0] = 70_000  # of the last process's part
    large = jax.tree.map(np.asarray, random_params(LARGE, jnp.float16))
    for name, params in {"small": small, "other": other, "beyond": beyond, "large": large}.items():
        config = LARGE if name == "large" else SMALL
        save_checkpoint(folder / name, tensors(params), config)
        np.savez(folder / f"{name}.npz", **by_path(params))
    shutil.copytree(folder / "small", folder / "torn")
    (folder / "torn" / "config.json").unlink()
    return folder


LOADS = {
    "torn": [("small", None, False), ("torn", None, False)],
    "other": [("small", None, False), ("other", None, False)],
    "dtype": [("small", None, False), ("small", "bfloat16", False)],
    "beyond": [("beyond", "float16", False), ("beyond", "float16", False)],
    "small": [("small", None, False), ("small", None, False)],
    "large": [("large", None, False), ("large", None, False)],
    "verified": [("large", None, True), ("large", None, True)],
}
"""What each process loads."""


@pytest.fixture(scope="module")
def done(folder):
    """What each process did, by the name of the load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loads = [
        [
            (str(folder / name), dtype, verify, str(folder / f"{name}.npz"))
            for name, dtype, verify in (calls[process] for calls in LOADS.values())
        ]
        for process in range(PROCESSES)
    ]
    module = "tests.helpers.loading_process"
    command = [sys.executable, "-m", module, str(port), str(PROCESSES)]
    started = [
        subprocess.Popen(
            [*command, str(process), json.dumps(loads[process])],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, stderr) in zip(started, said, strict=True):
        assert process.returncode == 0, stderr[-3000:]
    lines = [
        [json.loads(line) for line in stdout.splitlines() if line[:1] == "{"] for stdout, _ in said
    ]
    return dict(zip(LOADS, zip(*lines, strict=True), strict=True))


def weights(folder: pathlib.Path, name: str) -> int:
    """Return the bytes of a checkpoint's arrays."""
    return sum(array.nbytes for array in np.load(folder / f"{name}.npz").values())


@pytest.mark.slow
def test_each_process_reads_its_part_only(folder, done):
    whole = weights(folder, "large")
    assert whole > 50e6
    for load in done["large"]:
        assert load["different"] == []
        assert load["arrays"] == 2 + 1 + 9 * LARGE.num_layers
        assert load["parts"] < 0.51 * whole
        assert load["read"] < 0.6 * whole


def test_the_first_process_verifies_for_all(folder, done):
    whole = weights(folder, "large")
    first, second = done["verified"]
    assert first["different"] == second["different"] == []
    assert first["read"] > 2.4 * whole
    assert second["read"] < 0.6 * whole


def test_a_load_after_those_that_failed(done):
    assert [load["different"] for load in done["small"]] == [[], []]


@pytest.mark.parametrize(
    ("load", "first", "second"),
    [
        ("torn", "process 1 could not load the checkpoint; its error says why", "no config.json"),
        ("other", "process 1 loads other weights than process 0", "process 0 loads other weights"),
        ("dtype", "or in another dtype; give all processes the same checkpoint", "process 0 loads"),
        ("beyond", "process 1 could not load", "layer_1/attention/v: the float32 weights exceed"),
    ],
)
def test_where_one_process_fails_all_do(done, load, first, second):
    for found, expected in zip(done[load], (first, second), strict=True):
        assert expected in found["error"]
