"""Measure this project on this machine: against the machine's limits, and other programs.

  python -m benchmarks --shape=1b
  python -m benchmarks --shape=300m --dtype=float16 --against=hf,llamacpp
  python -m benchmarks --checkpoint=DIR --batch=1 --context=128,4000

The report goes to stdout, progress to stderr; figures and a plot go to files. Exit status: 0 done,
1 something failed while it was measured, 2 a mistake in the input. See benchmarks/README.md.
"""

import datetime
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys

from absl import flags

from benchmarks import machine
from benchmarks.cases import Case, Engine, make_plan, parse_peer
from benchmarks.command import (
    command_line,
    execute,
    make_flags,
    note,
    output_folder,
    read_dtypes,
    read_limits,
    slug,
)
from benchmarks.limits import median
from benchmarks.measure import Settings, measure, measure_limits
from benchmarks.report import make_report
from benchmarks.results import make_results
from benchmarks.shapes import SHAPES, load_shape
from llama_jax.config import ModelConfig
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError

FLAGS = make_flags()

flags.DEFINE_string(
    "shape",
    "1b",
    f"Model shape: {', '.join(SHAPES)}; random weights, but demo's.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder that `python -m convert` wrote; replaces --shape.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "dtype", ["float16", "bfloat16"], "Of weights and cache; each is measured.", flag_values=FLAGS
)
flags.DEFINE_list("batch", ["1", "8", "32"], "Rows that decode together.", flag_values=FLAGS)
flags.DEFINE_list(
    "prompt_len",
    ["128", "512", "2048"],
    "Tokens of a prompt; empty: no prefill.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "context",
    ["128", "2048", "4000"],
    "Tokens in the cache when decoding begins.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("new_tokens", 32, "Tokens to decode per row.", flag_values=FLAGS)
flags.DEFINE_list(
    "against",
    [],
    "Peers to measure in turns with it: hf, hf-compile, llamacpp, flax; in the first of --dtype, "
    "or as hf:bfloat16.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "rounds", 3, "Times that each case is timed in each engine.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "warm_start",
    True,
    "Load once more at the end, to time compiling from cache.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "flax_python",
    None,
    "Interpreter with transformers 4.49, jax and flax, for --against=flax.",
    flag_values=FLAGS,
)


def read_numbers(flag: str, *, at_least: int = 1) -> list[int]:
    """Return the whole numbers of a flag, each once, in order.

    Raises:
        InputError: one is not a whole number, or too small.
    """
    texts = FLAGS[flag].value or []
    for text in texts:
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < at_least:
            raise InputError(f"--{flag} has {text!r}, expected whole numbers from {at_least} on")
    return sorted({int(text) for text in texts})


def read_model() -> tuple[str, ModelConfig, str | None]:
    """Return the model's name, its shape and the folder of its weights, if they are to be read."""
    if FLAGS.checkpoint is None:
        path = str(DEMO_CHECKPOINT) if FLAGS.shape == "demo" else None
        return FLAGS.shape, load_shape(FLAGS.shape), path
    if FLAGS["shape"].present:
        raise InputError("--shape is given with --checkpoint, which has its own; drop one")
    path = pathlib.Path(FLAGS.checkpoint).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint} has no config.json; name the folder "
            "that `python -m convert` wrote"
        )
    return path.name, ModelConfig.load(path / "config.json"), str(path)


def read_engines() -> list[Engine]:
    """Return ours in each dtype, then the peers."""
    dtypes = read_dtypes(FLAGS.dtype)
    peers = [parse_peer(text, dtypes[0]) for text in FLAGS.against]
    if any(peer.kind == "flax" for peer in peers):
        if FLAGS.flax_python is None:
            raise InputError(
                "--against=flax needs --flax_python=PYTHON, an interpreter with transformers 4.49, "
                "jax and flax"
            )
        if shutil.which(FLAGS.flax_python) is None:
            raise InputError(f"--flax_python={FLAGS.flax_python} is no program; check the path")
    return list(dict.fromkeys([*(Engine("ours", dtype) for dtype in dtypes), *peers]))


def read_cases() -> list[Case]:
    """Return the cases in the order of running.

    Longer contexts come first: an engine that has to read a context cuts it back for the others.
    """
    if FLAGS.new_tokens < 1 or FLAGS.rounds < 1:
        raise InputError(
            f"--new_tokens is {FLAGS.new_tokens} and --rounds {FLAGS.rounds}, expected 1 or more"
        )
    prefill = [Case("prefill", tokens) for tokens in read_numbers("prompt_len")]
    decode = [
        Case("decode", context, batch, FLAGS.new_tokens)
        for batch in read_numbers("batch")
        for context in reversed(read_numbers("context"))
    ]
    if not prefill + decode:
        raise InputError("--prompt_len is empty, and so is --batch or --context: nothing to do")
    return prefill + decode


def output_files(name: str) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Return the paths to write, JSON, PNG and log, in a folder that exists then."""
    folder = output_folder(FLAGS.output, name)
    json_file, png, log = (folder / f"{name}.{ending}" for ending in ("json", "png", "log"))
    return json_file, png, log


def run() -> int:
    """Measure what the flags say; return the exit status."""
    model, config, checkpoint = read_model()
    engines, cases = read_engines(), read_cases()
    today = datetime.datetime.now().astimezone()
    if FLAGS.name is not None:
        output_files(FLAGS.name)  # a mistake should show now
    limits = read_limits(FLAGS.limits)
    on_gpu = limits.backend != "cpu"
    device = limits.device if on_gpu else machine.cpu_name()
    json_file, png, log = output_files(FLAGS.name or slug(f"{model} {device} {today:%Y-%m-%d}"))
    memory = limits.memory if on_gpu else machine.available_memory()
    plan = make_plan(config, engines, cases, memory)
    if not plan.cases:
        raise InputError(f"no case can be run: {plan.skipped[0].case} {plan.skipped[0].reason}")
    settings = Settings(
        config,
        checkpoint,
        FLAGS.rounds,
        FLAGS.warm_start,
        # Absolute, since engines run elsewhere; a link is kept: it makes a virtual environment.
        FLAGS.flax_python and os.path.abspath(shutil.which(FLAGS.flax_python) or ""),
        on_gpu,
        log,
    )
    samples = [limits]
    if FLAGS.limits is None:
        samples.append(measure_limits())
    measured = measure(plan, settings)
    if FLAGS.limits is None:
        samples += [measure_limits(), measure_limits()]
    results = make_results(
        config,
        median(samples),
        measured,
        {
            "model": model,
            "command": command_line("benchmarks", sys.argv[1:]),
            "date": today.isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "settings": {"rounds": FLAGS.rounds, "new_tokens": FLAGS.new_tokens},
            "weights": "checkpoint" if checkpoint else "random",
            "interleaved": plan.together,
        },
    )
    json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(make_report(results))
    note(f"\nwritten: {json_file}")
    if importlib.util.find_spec("matplotlib") is None:
        note("no plot: matplotlib is not installed; pip install -e '.[bench]'")
    else:
        from benchmarks.plot import draw_roofline

        draw_roofline(results, png)
        note(f"written: {png}")
    if measured.failures:
        note(f"what the engines printed is in {log}")
    return 1 if measured.failures else 0


def main(argv: list[str]) -> None:
    """Parse the command line, run, and exit."""
    execute(run, FLAGS, argv)


if __name__ == "__main__":
    main(sys.argv)
