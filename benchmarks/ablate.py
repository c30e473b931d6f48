"""Measure what else this project's plan could say on this machine, side by side.

  python -m benchmarks.ablate --shape=1b --only=steps,attention
  XLA_FLAGS=--xla_gpu_enable_triton_gemm=false python -m benchmarks.ablate --only=plan

The table goes to stdout, progress to stderr, every figure to OUTPUT/NAME.json. Exit status: 0 done,
1 a way failed, 2 a mistake in the input. See benchmarks/README.md.
"""

import collections
import dataclasses
import os
import re
import statistics
import sys
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from benchmarks import command, machine
from benchmarks.cases import Case
from benchmarks.engines import protocol
from benchmarks.limits import Limits
from benchmarks.measure import measure_limits
from benchmarks.model_cost import matmul_limit
from benchmarks.programs import compile_decode, time_decode, time_prefill
from benchmarks.report import number, problems, table
from benchmarks.shapes import load_shape
from benchmarks.weights import make_weights
from benchmarks.worker import jax_settings
from llama_jax.config import ModelConfig
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import Plan, choose_plan
from llama_jax.errors import InputError
from llama_jax.nn import attention, projection
from llama_jax.nn.cpu_kernels import has_kernels

CHOICES = ("steps", "prefill", "attention", "projection", "hlo", "plan")
FLAGS = command.make_flags("1b")
flags.DEFINE_list(
    "only", list(CHOICES[:-1]), f"Choices to measure: {', '.join(CHOICES)}.", flag_values=FLAGS
)
flags.DEFINE_string("dtype", "bfloat16", "Of weights and cache.", flag_values=FLAGS)
flags.DEFINE_integer("context", 1024, "Tokens in the cache when decoding.", flag_values=FLAGS)
flags.DEFINE_integer("prompt_len", 512, "Tokens of a prompt.", flag_values=FLAGS)
flags.DEFINE_integer("new_tokens", 64, "Tokens to decode.", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 3, "Times that each way is timed.", flag_values=FLAGS)
Figures = dict[str, Any]


def make_plans(choice: str, plan: Plan) -> dict[str, Plan]:
    """Return the ways of a choice by name; the plan's own comes first."""
    names, plans = [], []
    if choice == "steps":
        pairs = [(steps, plan.max_in_flight) for steps in (1, 4, 8, 16, 32)]
        pairs += [(plan.decode_steps, in_flight) for in_flight in (1, 2, 3)]
        plans = [plan._replace(decode_steps=s, max_in_flight=f) for s, f in pairs]
        names = [f"{s} steps, {f} in flight" for s, f in pairs]
    elif choice == "prefill":
        ends = (32, 64, 128, 256, 512)
        sizes = [tuple(2**i for i in range(4, end.bit_length())) for end in ends]
        plans = [plan._replace(prefill_sizes=size) for size in sizes]
        names = [f"chunks of {end}" for end in ends]
    elif choice in ("attention", "projection"):
        known = {"attention": attention, "projection": projection}[choice].IMPLEMENTATIONS
        on_cpu = jax.default_backend() == "cpu"
        unfit = () if on_cpu and has_kernels() else ("native",)
        unfit += () if on_cpu else ("two_rows", "blocked")  # ways around XLA's on a CPU
        names = [name for name in known if name not in unfit]
        plans = [plan._replace(kernels=plan.kernels._replace(**{choice: n})) for n in names]
    ways = {name: p for name, p in zip(names, plans, strict=True) if p != plan}
    return {"the plan": plan, **ways}


def time_plans(config: ModelConfig, choice: str) -> list[Figures]:
    """Time the model under each plan of a choice, in turns; each is run once untimed before."""
    dtype = FLAGS.dtype
    params = make_weights(config, dtype, None).params
    plans = make_plans(choice, choose_plan(config, dtype))
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
                    runs[name] = Executor(config, params, dtype, context=context, plan=plans[name])
                state, prefill_s = time_prefill(runs[name], None, prompt)
                _, decode_s = time_decode(runs[name], state, FLAGS.context, FLAGS.new_tokens)
                del state
                if turn:
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
    """Return the operations of a program by name, its copies by shape, and its bytes of memory."""
    memory: Any = compiled.memory_analysis()
    found = re.findall(r" = (\S+|\(.*?\)) ([a-z][\w-]*)\(", compiled.as_text() or "")
    copies = collections.Counter(shape for shape, name in found if name.startswith("copy"))
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "operations": dict(collections.Counter(name for _, name in found).most_common()),
        "copies": dict(copies.most_common()),
        "bytes": {name: getattr(memory, f"{name}_size_in_bytes", 0) for name in sizes},
    }


def add_rates(row: Figures, config: ModelConfig, limits: Limits) -> None:
    """Add tokens/s and the share of the limit to a row, from the medians of its rounds."""
    cases = (Case("prefill", FLAGS.prompt_len), Case("decode", FLAGS.context, 1, FLAGS.new_tokens))
    for case in cases if row.get("decode_s") else ():
        seconds = statistics.median(row[f"{case.op}_s"])
        cost = case.cost(config, FLAGS.dtype)
        limit = cost.limit_seconds(limits.bandwidth, matmul_limit(limits.matmul, FLAGS.dtype))
        row[f"{case.op}_tokens_per_s"] = case.counted / seconds
        row[f"{case.op}_of_limit"] = limit / seconds


def make_table(rows: list[Figures]) -> str:
    """Return the ways as text; below, what XLA made of the decode program."""
    columns = {
        "choice": lambda row: row["choice"],
        "way": lambda row: row["way"],
        "decode tok/s": lambda row: number(row.get("decode_tokens_per_s")),
        "of limit": lambda row: number(row.get("decode_of_limit")),
        "prefill tok/s": lambda row: number(row.get("prefill_tokens_per_s")),
        "of its limit": lambda row: number(row.get("prefill_of_limit")),
    }
    counts = [
        f"{name}: {', '.join(f'{key} {value:,}' for key, value in list(row[name].items())[:12])}"
        for row in rows
        for name in ("operations", "copies", "bytes")
        if name in row
    ]
    return "\n".join([table(columns, rows), *counts])


def run() -> int:
    """Measure what the flags say; return the exit status."""
    os.environ.update(jax_settings())
    command.check_positive(FLAGS, "context", "prompt_len", "new_tokens", "rounds")
    command.check_dtype(FLAGS.dtype)
    wrong = [choice for choice in FLAGS.only if choice not in CHOICES]
    if wrong or not FLAGS.only:
        raise InputError(f"--only has {wrong}, expected some of {', '.join(CHOICES)}")
    config = load_shape(FLAGS.shape)
    command.check_room(config, max(FLAGS.context + FLAGS.new_tokens, FLAGS.prompt_len))
    limits = measure_limits()
    device = machine.cpu_name() if limits.backend == "cpu" else limits.device
    path = command.output_path(FLAGS, "ablate", FLAGS.shape, device)
    record = command.start_record("benchmarks.ablate", FLAGS.shape, None)
    record["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    record |= {"limits": dataclasses.asdict(limits), "rows": [], "failures": []}
    for choice in dict.fromkeys(FLAGS.only):
        rows = [count_hlo(config)] if choice == "hlo" else time_plans(config, choice)
        for row in rows:
            add_rates(row, config, limits)
            if "failed" in row:
                record["failures"].append(f"{choice}, {row['way']}: {row['failed']}")
        record["rows"] += rows
        command.write_record(
            record, path, plot=False
        )  # after each: a run that is stopped keeps these
    print(f"{make_table(record['rows'])}\n{problems(record)}".rstrip())
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
