"""Measure what else this project's plan could say on this machine, side by side.

  python -m benchmarks.ablate --shape=1b --only=steps,attention
  XLA_FLAGS=--xla_gpu_enable_triton_gemm=false python -m benchmarks.ablate --only=plan

See benchmarks/README.md.
"""

import collections
import dataclasses
import os
import re
import statistics
import sys
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import command
from benchmarks.cases import Case
from benchmarks.engines import protocol
from benchmarks.limits import Limits
from benchmarks.measure import measure_limits
from benchmarks.programs import compile_decode, time_decode, time_prefill
from benchmarks.report import problems, table
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.weights import make_weights
from benchmarks.worker import jax_settings
from llama_jax.config import ModelConfig
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import Plan, choose_plan
from llama_jax.nn import attention, projection
from llama_jax.nn.cpu_kernels import has_kernels

CHOICES = ("steps", "prefill", "attention", "projection", "determinism", "hlo", "plan")
FLAGS = command.make_flags(
    "1b",
    only=(list(CHOICES[:-1]), f"Choices to measure: {', '.join(CHOICES)}."),
    dtype=("bfloat16", "Of weights and cache."),
    batch=(1, "Slots that decode at once."),
    context=(1024, "Tokens in the cache when decoding."),
    prompt_len=(512, "Tokens of a prompt."),
    new_tokens=(64, "Tokens to decode."),
    rounds=(3, "Times that each way is timed."),
)
Figures = dict[str, Any]


def make_plans(choice: str, config: ModelConfig, dtype: str) -> dict[str, Plan]:
    """Return the ways of a choice by name; the plan's own comes first."""
    plan = choose_plan(config, dtype)
    ways = {"the plan": plan}
    if choice == "steps":
        pairs = [(steps, plan.max_in_flight) for steps in (1, 4, 8, 16, 32)]
        pairs += [(plan.decode_steps, in_flight) for in_flight in (1, 2, 3)]
        for s, f in pairs:
            ways[f"{s} steps, {f} in flight"] = plan._replace(decode_steps=s, max_in_flight=f)
    elif choice == "prefill":
        sizes = (16, 32, 64, 128, 256, 512)
        for count in range(2, len(sizes) + 1):
            ways[f"chunks of {sizes[count - 1]}"] = plan._replace(prefill_sizes=sizes[:count])
    elif choice == "determinism":
        ways["fast"] = choose_plan(config, dtype, "fast")
    elif choice in ("attention", "projection"):
        on_cpu = jax.default_backend() == "cpu"
        unfit = () if on_cpu and has_kernels() else ("native",)
        unfit += () if on_cpu else ("two_rows", "blocked")  # ways around XLA's on a CPU
        for name in {"attention": attention, "projection": projection}[choice].IMPLEMENTATIONS:
            if name not in unfit:
                kernels = plan.kernels._replace(prefill_attention=None, decode_rows=None)
                ways[name] = plan._replace(kernels=kernels._replace(**{choice: name}))
    return {name: way for name, way in ways.items() if name == "the plan" or way != plan}


def time_plans(config: ModelConfig, choice: str) -> list[Figures]:
    """Time the model under each plan of a choice, in turns; each is run once untimed before."""
    dtype = FLAGS.dtype
    params = make_weights(config, dtype, None).params
    plans = make_plans(choice, config, dtype)
    context = max(FLAGS.context + FLAGS.new_tokens, FLAGS.prompt_len)
    prompt = protocol.prompt(FLAGS.prompt_len, config.vocab_size)
    rows = {name: Figures(choice=choice, way=name, prefill_s=[], decode_s=[]) for name in plans}
    runs: dict[str, Executor] = {}
    bar = tqdm(total=len(plans) * (FLAGS.rounds + 1), desc=choice, file=sys.stderr)
    for turn in range(FLAGS.rounds + 1):
        for name in plans if turn % 2 == 0 else reversed(plans):
            row = rows[name]
            try:
                if name not in runs:
                    shape = {"batch": FLAGS.batch, "context": context}
                    runs[name] = Executor(config, params, dtype, plan=plans[name], **shape)
                state, prefill_s = time_prefill(runs[name], None, prompt)
                _, decode_s = time_decode(runs[name], state, FLAGS.context, FLAGS.new_tokens)
                del state
                row["prefill_s"].append(prefill_s)
                row["decode_s"].append(decode_s)
            except Exception as error:  # a way that fails must not end the others' measurement
                row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            bar.update()
    bar.close()
    return list(rows.values())


def count_hlo(config: ModelConfig) -> Figures:
    """Count the operations of the compiled decode program, those inside fusions too."""
    plan = choose_plan(config, FLAGS.dtype)
    attend_len = 2 * attention.BLOCK
    compiled = compile_decode(config, plan, min(config.max_seq_len, 8 * attend_len), attend_len)
    return Figures(choice="hlo", way="the plan") | count_operations(compiled)


def count_operations(compiled: jax.stages.Compiled) -> Figures:
    """Return the operations of a program by name, and its bytes of memory."""
    memory: Any = compiled.memory_analysis()
    found = re.findall(r" = (?:\S+|\(.*?\)) ([a-z][\w-]*)\(", compiled.as_text() or "")
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "operations": dict(collections.Counter(found).most_common()),
        "bytes": {name: getattr(memory, f"{name}_size_in_bytes", 0) for name in sizes},
    }


def add_rates(row: Figures, config: ModelConfig, limits: Limits) -> None:
    """Add the figures of prefill and decode to a row, from the medians of its timed rounds."""
    decode = Case("decode", FLAGS.context, FLAGS.batch, FLAGS.new_tokens)
    cases = (Case("prefill", FLAGS.prompt_len), decode)
    for case in cases:
        if timed := row.get(f"{case.op}_s", [])[1:]:
            seconds = statistics.median(timed)
            row[case.op] = case.figures(config, FLAGS.dtype, seconds, limits)


def make_table(rows: list[Figures]) -> str:
    """Return the ways as text; below, what XLA made of the decode program."""
    ways = [{"choice": row["choice"], "way": row["way"]} for row in rows]
    for way, row in zip(ways, rows, strict=True):
        for op in ("decode", "prefill"):
            if op in row:
                way[f"{op} tok/s"] = row[op]["tokens_per_s"]
                way[f"{op} of limit"] = row[op]["fraction_of_limit"]
    counts = [
        f"{name}: {', '.join(f'{key} {value:,}' for key, value in list(row[name].items())[:12])}"
        for row in rows
        for name in ("operations", "bytes")
        if name in row
    ]
    return "\n".join([table(ways), *counts])


def run() -> int:
    """Measure what the flags say; return the exit status."""
    os.environ.update(jax_settings())
    command.check_choices("--shape", [FLAGS.shape], SHAPES)
    command.check_dtypes([FLAGS.dtype])
    command.check_choices("--only", FLAGS.only, CHOICES)
    config = load_shape(FLAGS.shape)
    command.check_room(config, max(FLAGS.context + FLAGS.new_tokens, FLAGS.prompt_len))
    limits = measure_limits()
    path = command.output_path(FLAGS, "ablate", FLAGS.shape)
    record = command.start_record("benchmarks.ablate", FLAGS.shape, None)
    record |= {"limits": dataclasses.asdict(limits), "rows": [], "failures": []}
    record["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    for choice in dict.fromkeys(FLAGS.only):
        rows = [count_hlo(config)] if choice == "hlo" else time_plans(config, choice)
        for row in rows:
            add_rates(row, config, limits)
            if "failed" in row:
                record["failures"].append(f"{choice}, {row['way']}: {row['failed']}")
        record["rows"] += rows
        command.write_record(record, path, plot=False)  # a run that is stopped keeps these
    print(f"{make_table(record['rows'])}\n{problems(record)}".rstrip())
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
