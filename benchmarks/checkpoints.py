"""Measure what is done with checkpoints: convert, verify, load, export; seconds and peak memory.

  python -m benchmarks.checkpoints --folder=DIR
  python -m benchmarks.checkpoints --shape=demo --dtype=float32,float16 --folder=DIR

A source in the Hugging Face layout is made up first, of random weights of the shape. Every step is
a process of its own, and reads from the disk what it would find in memory otherwise. --folder needs
room for the weights as given and as stored; what is made there is removed. The table goes to
stdout, progress to stderr, every figure to OUTPUT/NAME.json. Exit status: 0 done, 1 a step failed,
2 a mistake in the input.
"""

import json
import math
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import machine
from benchmarks.command import command_line, execute, note, output_folder, read_dtypes, slug
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.worker import EngineError
from convert.export import write_hf
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.nn.transformer import param_shapes
from llama_jax.weights.atomic_directory import check_absent
from llama_jax.weights.shards import Tensor, by_path

ROOT = pathlib.Path(__file__).resolve().parent.parent
READ_BYTES = 2**32  # at most, to measure the disk by

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "shape", "7b", f"Model shape: {', '.join(SHAPES)}; random weights.", flag_values=FLAGS
)
flags.DEFINE_list(
    "dtype", ["float16"], "Of the source; a second one: to convert to.", flag_values=FLAGS
)
flags.DEFINE_string("folder", None, "Where to make and convert the weights.", flag_values=FLAGS)
flags.DEFINE_string("output", "benchmarks/results", "Folder for the record.", flag_values=FLAGS)
flags.DEFINE_string(
    "name", None, "Of the record; default: checkpoints, shape and dtype.", flag_values=FLAGS
)


def random_tensors(config: ModelConfig, dtype: str) -> Iterator[Tensor]:
    """Yield every parameter of a model, drawn from a normal distribution of deviation 0.02."""
    rng = np.random.default_rng(0)
    for path, leaf in by_path(param_shapes(config)).items():
        values = rng.standard_normal(leaf.shape, dtype=np.float32)
        values *= 0.02
        yield Tensor(path, values.astype(jnp.dtype(dtype)))


def make_source(folder: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write a random model in the Hugging Face layout."""
    folder.mkdir(parents=True)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))

    def with_progress() -> Iterator[Tensor]:
        with tqdm(total=size, desc="making weights", unit_scale=True) as bar:
            for tensor in random_tensors(config, dtype):
                yield tensor
                bar.update(tensor.array.size)

    write_hf(folder, with_progress(), config, dtype)


def read_speed(folder: pathlib.Path) -> float:
    """Return the bytes/s at which large files of a folder come from the disk."""
    forget(folder)
    buffer = bytearray(2**24)
    done, began = 0, time.perf_counter()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and done < READ_BYTES:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    done += count
    return done / (time.perf_counter() - began)


def forget(folder: pathlib.Path) -> None:
    """Have the system drop what it keeps of a folder's files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_step(*command: str) -> dict[str, Any]:
    """Run Python with arguments; return its seconds, its peak of memory and what it printed.

    Raises:
        EngineError: it failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise EngineError(f"{' '.join(command[:3])}: exit status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit, "said": said.strip()}


def measure(folder: pathlib.Path, shape: str, dtypes: list[str]) -> dict[str, Any]:
    """Make, convert, verify, load and export a model beneath a folder."""
    config = load_shape(shape)
    source, stored, exported = (folder / name for name in ("source", "stored", "exported"))
    # In a process of its own: a child's peak begins at what its parent has.
    maker = multiprocessing.get_context("spawn").Process(
        target=make_source, args=(source, config, dtypes[0])
    )
    maker.start()
    maker.join()
    if maker.exitcode != 0:
        raise EngineError(f"making the source: exit status {maker.exitcode}")
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config))]
    source_bytes, stored_bytes = (
        sum(sizes) * jnp.dtype(dtype).itemsize for dtype in (dtypes[0], dtypes[-1])
    )
    speed = read_speed(source)
    idle = run_step("-c", "import convert.__main__")
    steps = {}

    def step(name: str, reads: pathlib.Path, *command: str) -> None:
        note(name)
        forget(reads)
        steps[name] = run_step(*command)
        steps[name]["said"] = steps[name]["said"].replace(f"{folder}{os.sep}", "")

    step(
        "convert", source, "-m", "convert", "hf", str(source), str(stored), f"--dtype={dtypes[-1]}"
    )
    step("verify", stored, "-m", "convert", "verify", str(stored))
    run = ["run.py", f"--checkpoint={stored}", "--prompt_tokens=1,5,7", "--max_tokens=1"]
    step("load, one token", stored, *run, "--context=128", "--output=json")
    load = json.loads(steps["load, one token"].pop("said"))["timings"]["load_s"]
    shutil.rmtree(source)
    step("export", stored, "-m", "convert", "export-hf", str(stored), str(exported))
    return {
        "source_bytes": source_bytes,
        "stored_bytes": stored_bytes,
        "disk_bytes_per_s": speed,
        "idle_peak_bytes": idle["peak_bytes"],
        "load_s": load,
        "load_fraction_of_disk": stored_bytes / load / speed,
        "steps": steps,
    }


def table(record: dict[str, Any]) -> str:
    """Return the figures for a person."""
    lines = [
        f"{record['shape']}: {' to '.join(record['dtypes'])}, "
        f"{record['stored_bytes'] / 1e9:.2f} GB stored; the disk reads "
        f"{record['disk_bytes_per_s'] / 1e9:.2f} GB/s; an idle process peaks at "
        f"{record['idle_peak_bytes'] / 1e9:.2f} GB",
        "",
        f"{'step':<16}{'s':>8}{'peak GB':>10}{'above idle':>12}",
    ]
    lines += [
        f"{name:<16}{step['seconds']:>8.1f}{step['peak_bytes'] / 1e9:>10.2f}"
        f"{(step['peak_bytes'] - record['idle_peak_bytes']) / 1e9:>12.2f}"
        for name, step in record["steps"].items()
    ]
    lines += [
        "",
        f"loading took {record['load_s']:.1f} s: {record['load_fraction_of_disk']:.0%} of the "
        "disk's speed",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure and report; return the exit status."""
    dtypes = read_dtypes(FLAGS.dtype)
    if FLAGS.folder is None or len(dtypes) > 2:
        raise InputError(
            f"got --folder={FLAGS.folder} and --dtype={','.join(dtypes)}, expected a folder and "
            "one or two dtypes"
        )
    folder = pathlib.Path(FLAGS.folder).expanduser().absolute() / "llama_jax_checkpoints"
    check_absent(folder)
    name = FLAGS.name or slug(f"checkpoints-{FLAGS.shape}-{'-'.join(dtypes)}")
    output = output_folder(FLAGS.output, name)
    try:
        figures = measure(folder, FLAGS.shape, dtypes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = command_line("benchmarks.checkpoints", sys.argv[1:])
    record = {"command": command, "shape": FLAGS.shape, "dtypes": dtypes}
    record |= {"machine": machine.describe()} | figures
    (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(record))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    execute(main, FLAGS, sys.argv)
