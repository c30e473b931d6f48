"""Measure this project on this machine: against the machine's limits, and other programs.

  python -m benchmarks --shape=1b
  python -m benchmarks --shape=300m --dtype=float16 --against=hf,llamacpp
  python -m benchmarks --shape=1b --dtype=float16 --weights=full,int8
  python -m benchmarks --checkpoint=DIR --batch=1 --context=128,4000

See benchmarks/README.md.
"""

import pathlib
import sys

from benchmarks import command
from benchmarks.cases import PEERS, WEIGHTS, Case, Engine, make_plan, parse_peer
from benchmarks.limits import median
from benchmarks.measure import Run, measure_limits
from benchmarks.report import make_report
from llama_jax.decode.host import free_memory
from llama_jax.errors import InputError

FLAGS = command.make_flags(
    "1b",
    checkpoint=command.CHECKPOINT,
    dtype=(["float16", "bfloat16"], "Of weights and cache; each is measured."),
    weights=(["full"], "full, or int8: projections are, of random weights; each is measured."),
    batch=(["1", "8", "32"], "Slots that decode together."),
    prompt_len=(["128", "512", "2048"], "Tokens of a prompt; empty: no prefill."),
    context=(["128", "2048", "4000"], "Tokens in each slot's cache when decoding begins."),
    against=(
        [],
        f"Peers to measure in turns with it: {', '.join(PEERS)}; in the first of --dtype, "
        "or as hf:bfloat16; llamacpp:float16:int8 is Q8_0.",
    ),
    new_tokens=(32, "Tokens to decode in each slot."),
    rounds=(3, "Times that each case is timed."),
    warm_start=(True, "Load ours again, to time compiling from cache."),
)


def read_engines() -> list[Engine]:
    """Return ours in each dtype, then the peers."""
    if not FLAGS.dtype:
        raise InputError("--dtype is empty, expected float16, bfloat16 or float32")
    command.check_dtypes(FLAGS.dtype)
    command.check_choices("--weights", FLAGS.weights, WEIGHTS)
    if not FLAGS.weights:
        raise InputError("--weights is empty, expected full, int8 or both")
    if FLAGS.checkpoint and FLAGS.weights != ["full"]:
        raise InputError(
            "--weights is given with --checkpoint, which has its own; drop one, or name what "
            "`python -m convert quantize` wrote"
        )
    ours = [Engine("ours", dtype, weights) for dtype in FLAGS.dtype for weights in FLAGS.weights]
    peers = [parse_peer(text, FLAGS.dtype[0]) for text in FLAGS.against]
    return list(dict.fromkeys([*ours, *peers]))


def read_cases() -> list[Case]:
    """Return the cases in the order of running.

    Longer contexts come first: an engine that has to read a context cuts it back for the others.
    """
    prefill = [Case("prefill", tokens) for tokens in command.read_numbers(FLAGS, "prompt_len")]
    decode = [
        Case("decode", context, batch, FLAGS.new_tokens)
        for batch in command.read_numbers(FLAGS, "batch")
        for context in reversed(command.read_numbers(FLAGS, "context"))
    ]
    if not prefill + decode:
        raise InputError("--prompt_len is empty, and so is --batch or --context: nothing to do")
    return prefill + decode


def run() -> int:
    """Measure what the flags say; return the exit status."""
    model, config, checkpoint = command.read_model(FLAGS)
    engines, cases = read_engines(), read_cases()
    path = command.output_path(FLAGS, model)
    record = command.start_record("benchmarks", model, checkpoint)
    command.note("measuring the machine's limits")
    limits = [measure_limits(), measure_limits()]
    on_gpu = limits[0].backend != "cpu"
    memory = limits[0].memory if on_gpu else free_memory()
    plan, skipped = make_plan(config, engines, cases, memory)
    log = pathlib.Path(f"{path}.log")
    measured = Run(plan, config, checkpoint, FLAGS.rounds, FLAGS.warm_start, on_gpu, log)
    measured.measure()
    limits += [measure_limits(), measure_limits()]
    record["settings"] = {"rounds": FLAGS.rounds, "new_tokens": FLAGS.new_tokens}
    record |= measured.record(median(limits)) | {"skipped": skipped}
    print(make_report(record))
    command.write_record(record, path)
    if measured.failures:
        command.note(f"what the engines printed is in {log}")
    return 1 if measured.failures else 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
