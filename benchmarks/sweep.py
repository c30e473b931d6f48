"""Measure this project's open choices on this machine: the ways it could compute, side by side.

  python -m benchmarks.sweep
  python -m benchmarks.sweep --shape=1b --dtype=bfloat16 --only=projection,attention
  python -m benchmarks.sweep --only=steps,flags --budget_s=120

The tables go to stdout, progress to stderr, every figure to OUTPUT/sweep-NAME.json. Exit status:
0 done, 1 a way of ours failed, 2 a mistake in the input. See benchmarks/README.md.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags

from benchmarks import machine
from benchmarks.choices.attending import attention
from benchmarks.choices.compiled import hlo
from benchmarks.choices.flags import flags as xla_flags
from benchmarks.choices.products import fused, projection
from benchmarks.choices.running import prefill, sampling, steps
from benchmarks.choices.setting import SIZES, Setting
from benchmarks.choices.table import make_table
from benchmarks.choices.trial import Trial, mark_best
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
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.worker import jax_settings
from llama_jax.decode.plan import choose_plan
from llama_jax.errors import InputError

CHOICES: dict[str, Callable[[Setting], Iterator[Trial]]] = {
    "steps": steps,
    "attention": attention,
    "prefill": prefill,
    "fused": fused,
    "projection": projection,
    "sampling": sampling,
    "hlo": hlo,
    "flags": xla_flags,
}
"""Each lists its ways, those that matter most first: a budget may cut the rest."""

FLAGS = make_flags()

flags.DEFINE_list(
    "only",
    list(CHOICES),
    f"Choices to measure, in this order: {', '.join(CHOICES)}.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "shape",
    None,
    f"Model shape: {', '.join(SHAPES)}; random weights. Default: 7b, on a CPU 1b.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "dtype",
    None,
    "Of weights and cache. Default: float16,bfloat16, on a CPU float32 too.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "size", "full", list(SIZES), "How much is measured; small: to try it.", flag_values=FLAGS
)
flags.DEFINE_float(
    "budget_s", None, "Seconds after which nothing new is measured.", flag_values=FLAGS
)
flags.DEFINE_list(
    "decode_steps",
    None,
    "Steps per dispatch that the choice `steps` tries; of one number nothing else is varied.",
    flag_values=FLAGS,
)
flags.DEFINE_multi_string(
    "xla_flags",
    None,
    "A setting of XLA_FLAGS for the choice `flags`, which runs each in a process of its own; may "
    "be repeated. Default: those of interest on a GPU.",
    flag_values=FLAGS,
)


def make_setting() -> Setting:
    """Return what the flags say.

    Raises:
        InputError: they make no sense.
    """
    for choice in FLAGS.only:
        if choice not in CHOICES:
            raise InputError(f"--only names {choice!r}, expected {', '.join(CHOICES)}")
    if not FLAGS.only:
        raise InputError(f"--only is empty, expected some of {', '.join(CHOICES)}")
    budget = math.inf if FLAGS.budget_s is None else FLAGS.budget_s
    size = SIZES[FLAGS.size]
    if FLAGS.decode_steps is not None:
        if not all(re.fullmatch(r"[1-9]\d{0,3}", text) for text in [*FLAGS.decode_steps, "1"]):
            raise InputError(f"--decode_steps={','.join(FLAGS.decode_steps)}, expected numbers")
        counts = tuple(dict.fromkeys(int(text) for text in FLAGS.decode_steps))
        size = dataclasses.replace(size, steps=counts or size.steps)
    if FLAGS.name is not None:
        output_folder(FLAGS.output, FLAGS.name)  # a mistake should show now
    on_cpu = jax.default_backend() == "cpu"
    shape = FLAGS.shape or ("1b" if on_cpu else "7b")
    config = load_shape(shape)
    dtypes = FLAGS.dtype or ["float16", "bfloat16", *(["float32"] if on_cpu else [])]
    dtypes = read_dtypes(dtypes)
    began = time.perf_counter()
    limits = read_limits(FLAGS.limits)
    device = machine.cpu_name() if on_cpu else limits.device
    name = FLAGS.name or slug(f"{shape} {device} {datetime.date.today()}")
    folder = output_folder(FLAGS.output, name)
    return Setting(
        shape,
        config,
        dtypes,
        FLAGS.size,
        size,
        limits,
        folder,
        name,
        FLAGS.xla_flags,
        ends=began + budget,
    )


def measure(choice: str, setting: Setting) -> list[dict[str, Any]]:
    """Return the rows of a choice; ways that the budget cuts say so."""
    try:
        trials = list(CHOICES[choice](setting))
    except Exception as error:  # a choice that fails must not end the sweep
        return [_failed(choice, error).run(setting.limits)]
    rows = []
    for trial in trials:
        if setting.left() <= 0:
            rows.append(trial.row(setting.limits, skipped="left out: the budget is spent"))
            continue
        rows.append(trial.run(setting.limits))
        told = " ".join([*map(str, trial.case.values()), trial.form])
        outcome = rows[-1]["failed"] or rows[-1]["skipped"]
        note(f"  {choice} {told}" + (f": {outcome}" if outcome else ""))
    mark_best(rows)
    return rows


def _failed(choice: str, error: Exception) -> Trial:
    def fail() -> float:
        raise error

    return Trial({}, choice, fail)


def run() -> int:
    """Measure what the flags say; return the exit status."""
    # Before the device is used: what one choice frees, another's process may need.
    os.environ.update(jax_settings())
    setting = make_setting()
    results: dict[str, Any] = {
        "shape": setting.shape,
        "command": command_line("benchmarks.sweep", sys.argv[1:]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "limits": dataclasses.asdict(setting.limits),
        "config": dataclasses.asdict(setting.config),
        "size": dataclasses.asdict(setting.size),
        "plans": {d: choose_plan(setting.config, d)._asdict() for d in setting.dtypes},
        "choices": {},
        "left_out": [],
    }
    path: pathlib.Path = setting.folder / f"sweep-{setting.name}.json"
    for choice in dict.fromkeys(FLAGS.only):
        if setting.left() <= 0:
            results["left_out"].append(choice)
            continue
        began = time.perf_counter()
        rows = measure(choice, setting)
        seconds = time.perf_counter() - began
        results["choices"][choice] = {"seconds": seconds, "rows": rows}
        # After each: a sweep that is stopped keeps what it has.
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{choice}, {seconds:.0f} s\n{make_table(rows)}\n", flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if results["left_out"]:
        print(f"left out, the budget is spent: {', '.join(results['left_out'])}")
    note(f"written: {path}")
    rows = [row for choice in results["choices"].values() for row in choice["rows"]]
    failed = sum(row["failed"] is not None for row in rows)
    if failed:
        note(f"{failed} of {len(rows)} failed: see the tables")
    return 1 if failed else 0


def main(argv: list[str]) -> None:
    """Parse the command line, run, and exit."""
    execute(run, FLAGS, argv)


if __name__ == "__main__":
    main(sys.argv)
