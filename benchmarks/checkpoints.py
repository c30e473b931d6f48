"""Measure what is done with checkpoints: convert, verify, load, export; seconds and peak memory.

  python -m benchmarks.checkpoints --folder=DIR
  python -m benchmarks.checkpoints --shape=demo --dtype=float32,float16 --folder=DIR

A source in the Hugging Face layout is made up first, of random weights. Every step is a process of
its own and reads from the disk. --folder needs room for the weights as given and as stored; what is
made there is removed.
"""

import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import command
from benchmarks.model_cost import weight_bytes
from benchmarks.report import table
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.worker import ROOT, EngineError
from convert.export import write_hf
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.nn.transformer import param_shapes
from llama_jax.weights.atomic_directory import check_absent
from llama_jax.weights.shards import Tensor, by_path

FLAGS = command.make_flags(
    "7b",
    dtype=(["float16"], "Of the source; and to convert to."),
    folder=("", "Where to make and convert weights."),
)


def make_source(folder: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write a model in the Hugging Face layout, of random weights of deviation 0.02."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[Tensor]:
        for path, leaf in tqdm(by_path(param_shapes(config)).items(), desc="making weights"):
            values = rng.standard_normal(leaf.shape, dtype=np.float32)
            values *= 0.02
            yield Tensor(path, values.astype(jnp.dtype(dtype)))

    write_hf(folder, tensors(), config, dtype)


def read_speed(folder: pathlib.Path) -> float:
    """Return the bytes/s at which the weights of a folder come from the disk."""
    forget(folder)
    # A small buffer: a step's peak of memory begins at what this process has had.
    buffer, paths = bytearray(2**24), list(folder.glob("*.safetensors"))
    began = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return sum(path.stat().st_size for path in paths) / (time.perf_counter() - began)


def forget(folder: pathlib.Path) -> None:
    """Have the system drop what it keeps of a folder's files in memory."""
    for path in folder.rglob("*") if hasattr(os, "posix_fadvise") else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_step(*arguments: str) -> tuple[dict[str, float], str]:
    """Run Python with arguments; return its seconds and peak of memory, and what it printed."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise EngineError(f"{' '.join(arguments[:3])}: exit status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit}, said


def measure(folder: pathlib.Path, config: ModelConfig, dtypes: list[str]) -> dict[str, Any]:
    """Make, convert, verify, load and export a model beneath a folder."""
    source, stored, exported = (folder / name for name in ("source", "stored", "exported"))
    # In a process of its own, as every step: what it takes must not count in theirs.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(make_source, source, config, dtypes[0]).result()
    source_bytes, stored_bytes = (weight_bytes(config, d) for d in (dtypes[0], dtypes[-1]))
    speed = read_speed(source)
    steps = {}

    def step(name: str, reads: pathlib.Path, *arguments: str) -> str:
        command.note(name)
        forget(reads)
        steps[name], said = run_step(*arguments)
        return said

    convert = ("-m", "convert")
    step("import alone", source, "-c", "import convert.__main__")
    step("convert", source, *convert, "hf", str(source), str(stored), f"--dtype={dtypes[-1]}")
    step("verify", stored, *convert, "verify", str(stored))
    run = ["run.py", f"--checkpoint={stored}", "--prompt_tokens=1,5,7", "--max_tokens=1"]
    said = step("load, one token", stored, *run, "--context=128", "--output=json")
    load = json.loads(said)["timings"]["load_s"]
    shutil.rmtree(source)
    step("export", stored, *convert, "export-hf", str(stored), str(exported))
    return {
        "source_bytes": source_bytes,
        "stored_bytes": stored_bytes,
        "disk_bytes_per_s": speed,
        "load_s": load,
        "load_fraction_of_disk": stored_bytes / load / speed,
        "steps": steps,
    }


def make_report(record: dict[str, Any]) -> str:
    """Return the figures as text."""
    rows = [
        {"step": name, "s": figures["seconds"], "peak GB": figures["peak_bytes"] / 1e9}
        for name, figures in record["steps"].items()
    ]
    return (
        f"{record['model']}: {' to '.join(record['dtypes'])}, "
        f"{record['stored_bytes'] / 1e9:.2f} GB stored; the disk reads "
        f"{record['disk_bytes_per_s'] / 1e9:.2f} GB/s\n\n{table(rows)}\n\n"
        f"loading took {record['load_s']:.1f} s: {record['load_fraction_of_disk']:.0%} of the "
        "disk's speed"
    )


def run() -> int:
    """Measure and report; return the exit status."""
    dtypes = FLAGS.dtype
    command.check_dtypes(dtypes)
    command.check_choices("--shape", [FLAGS.shape], SHAPES)
    if not FLAGS.folder or len(dtypes) not in (1, 2):
        raise InputError(
            f"got --folder={FLAGS.folder} and --dtype={','.join(dtypes)}, expected a folder and "
            "one or two dtypes"
        )
    config = load_shape(FLAGS.shape)
    folder = pathlib.Path(FLAGS.folder).expanduser().absolute() / "llama_jax_checkpoints"
    check_absent(folder)
    path = command.output_path(FLAGS, "checkpoints", FLAGS.shape, *dtypes)
    record = command.start_record("benchmarks.checkpoints", FLAGS.shape, None) | {"dtypes": dtypes}
    try:
        record |= measure(folder, config, dtypes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(make_report(record))
    command.write_record(record, path, plot=False)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    command.execute(run, FLAGS, sys.argv)
