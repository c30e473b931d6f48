"""Trace the decoding of tokens: what runs, how often, how long, and what lies between.

  python -m benchmarks.trace --shape=1b --dtype=float16

On a CPU a token's operations run one after the other. A kernel is an `ffi_call`; all else is XLA's.
The last row, `gaps`, is the time in which none of them runs, the host's between two calls included.
Tracing takes some of a token's time itself.
"""

import collections
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from benchmarks import command
from benchmarks.programs import time_decode
from benchmarks.report import table
from benchmarks.weights import make_weights
from benchmarks.worker import EngineError
from llama_jax.decode.executor import Executor
from llama_jax.errors import InputError

FLAGS = command.make_flags(
    "1b",
    checkpoint=command.CHECKPOINT,
    dtype=("float16", "Of weights and cache."),
    context=(512, "Tokens in the cache when decoding begins."),
    new_tokens=(32, "Tokens to decode."),
)

LOOP = "while"
"""The operation that draws tokens one by one."""

CONTAINERS = {LOOP, "conditional", "call"}
"""Operations that are others."""

END = "end: "
"""Begins the mark of an operation's end."""

GAPS = "gaps"


class Event(NamedTuple):
    """What a thread did, in nanoseconds."""

    kind: str
    """Its name, without the number that XLA gives it."""
    begin: float
    end: float


def read_threads(folder: str) -> list[list[Event]]:
    """Return the events of each thread of a trace."""
    [path] = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
    return [
        [
            Event(re.sub(r"[.\d]+$", "", event.name), event.start_ns, event.end_ns)
            for event in line.events
        ]
        for plane in data.planes
        for line in plane.lines
    ]


def find_operations(threads: Iterable[Iterable[Event]]) -> tuple[list[Event], float]:
    """Return what ran since the first loop began, and how long that took.

    One after the other in any of the threads. What computes has a mark of its end beside it.

    Raises:
        EngineError: the trace has no loop.
    """
    events = [event for thread in threads for event in thread]
    kinds = {event.kind.removeprefix(END) for event in events if event.kind.startswith(END)}
    loops = [event.begin for event in events if event.kind == LOOP]
    if not loops:
        raise EngineError(
            f"the trace has no operation {LOOP!r}, the loop of tokens: this jaxlib has another "
            "name for it, or more tokens were traced than a trace can hold; try fewer --new_tokens"
        )
    begin = min(loops)
    found = [
        event
        for event in events
        if event.kind in kinds - CONTAINERS and begin <= event.begin < event.end
    ]
    return sorted(found, key=lambda event: event.begin), max(e.end for e in found) - begin


def make_rows(threads: Iterable[Iterable[Event]], tokens: int) -> list[dict[str, Any]]:
    """Return a row for each kind of operation, the longest first, and one for the gaps."""
    found, total = find_operations(threads)
    took = collections.defaultdict[str, list[float]](list)
    gaps, until = total, 0.0
    for kind, begin, end in found:
        took[kind].append(end - begin)
        gaps -= max(0.0, end - max(begin, until))
        until = max(until, end)
    kinds = sorted(((kind, len(own), sum(own)) for kind, own in took.items()), key=lambda k: -k[2])
    return [
        {
            "operation": kind,
            "a token": round(count / tokens, 1) if count else None,
            "µs a token": round(own / tokens / 1e3, 1),
            "share": round(own / total, 4),
        }
        for kind, count, own in [*kinds, (GAPS, 0, gaps)]
    ]


def run() -> int:
    """Trace what the flags say; return the exit status."""
    command.check_dtypes([FLAGS.dtype])
    if jax.default_backend() != "cpu":
        raise InputError("this reads traces of a CPU; of an accelerator jax.profiler has its own")
    model, config, weights = command.read_model(FLAGS)
    context = FLAGS.context + FLAGS.new_tokens
    command.check_room(config, context)
    path = command.output_path(FLAGS, "trace", model)
    record = command.start_record("benchmarks.trace", model, weights)
    params = make_weights(config, FLAGS.dtype, weights).params
    executor = Executor(config, params, FLAGS.dtype, batch=1, context=context)
    state, _ = time_decode(executor, None, FLAGS.context, FLAGS.new_tokens)  # compiles
    state, untraced = time_decode(executor, state, FLAGS.context, FLAGS.new_tokens)
    with tempfile.TemporaryDirectory(prefix="benchmarks_") as folder:
        with jax.profiler.trace(folder):
            time_decode(executor, state, FLAGS.context, FLAGS.new_tokens)
        record["rows"] = make_rows(read_threads(folder), FLAGS.new_tokens)
    record["ms_per_token_untraced"] = untraced / FLAGS.new_tokens * 1e3
    print(table(record["rows"]))
    command.write_record(record, path, plot=False)
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
