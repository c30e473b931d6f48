"""Measure the server: what clients see under load, against the engine alone and other servers.

  python -m benchmarks.serve --shape=300m
  python -m benchmarks.serve --shape=300m --slots=1,2,4,8 --clients=64 --gap=2000
  python -m benchmarks.serve --shape=1b --rate=50%,80% --against=llamacpp,hf

The tables go to stdout, progress to stderr; figures and a plot go to files. Exit status: 0 done,
1 something failed while it was measured, 2 a mistake in the input. See benchmarks/README.md.
"""

import datetime
import importlib.util
import json
import pathlib
import re
import shutil
import sys
import tempfile

from absl import flags

from benchmarks import machine
from benchmarks.cases import parse_dtype
from benchmarks.command import command_line, execute, note, output_folder, slug
from benchmarks.load import vocabulary
from benchmarks.load.measure import Load, measure
from benchmarks.load.points import make_points
from benchmarks.load.programs import PROGRAMS, Launch
from benchmarks.load.record import make_record
from benchmarks.load.report import make_report
from benchmarks.shapes import SHAPES, load_shape
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError

FLAGS = flags.FlagValues()
PEERS = [name for name in PROGRAMS if name != "ours"]

flags.DEFINE_string(
    "shape", "300m", f"Model shape: {', '.join(SHAPES)}; random weights.", flag_values=FLAGS
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder that `python -m convert` wrote; replaces --shape.",
    flag_values=FLAGS,
)
flags.DEFINE_string("dtype", "float16", "Of weights and cache.", flag_values=FLAGS)
flags.DEFINE_list(
    "slots",
    ["8"],
    "Answers drawn at once; of several, only the most get all loads, the others the most clients.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("prompt_len", 64, "Tokens of a prompt.", flag_values=FLAGS)
flags.DEFINE_integer("new_tokens", 64, "Tokens to draw for each.", flag_values=FLAGS)
flags.DEFINE_integer(
    "context", None, "Tokens that a slot holds; default: what prompts need.", flag_values=FLAGS
)
flags.DEFINE_list(
    "clients",
    ["1", "4", "16", "64"],
    "Closed loops: each client waits for its answer.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "rate",
    [],
    "Open loops: requests a second, at random times; 80%: of what the most clients got through.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "requests", 128, "Of each load, at most; 16 for each client.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "shared", True, "Also: the most clients, whose prompts begin alike.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "batch", True, "Also: the same requests through the engine, no server.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "gap",
    None,
    "Also: how long streams wait while a prompt of so many tokens comes in.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "against", [], f"Peers to measure in turns with it: {', '.join(PEERS)}.", flag_values=FLAGS
)
flags.DEFINE_string(
    "llama_server",
    "llama-server",
    "llama.cpp's program, for --against=llama-server.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("rounds", 3, "Times that everything is measured.", flag_values=FLAGS)
flags.DEFINE_float("timeout_s", 300.0, "Seconds for one answer; then it failed.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of prompts and of arrivals.", flag_values=FLAGS)
flags.DEFINE_string("output", "benchmarks/results", "Folder for the files.", flag_values=FLAGS)
flags.DEFINE_string(
    "name", None, "Of the files; default: serve, model, processor and date.", flag_values=FLAGS
)


def read_numbers(flag: str) -> list[int]:
    """Return the whole numbers of a flag, each once, in order.

    Raises:
        InputError: there is none, or one is not a whole number from 1 on.
    """
    texts = FLAGS[flag].value or []
    if not texts or not all(re.fullmatch(r"[1-9]\d{0,8}", text) for text in texts):
        raise InputError(f"--{flag} is {','.join(texts)!r}, expected whole numbers from 1 on")
    return sorted({int(text) for text in texts})


def read_model() -> tuple[str, ModelConfig, str | None]:
    """Return the model's name, its shape and the folder of its weights, if they are to be read."""
    if FLAGS.checkpoint is None:
        return FLAGS.shape, load_shape(FLAGS.shape), None
    if FLAGS["shape"].present:
        raise InputError("--shape is given with --checkpoint, which has its own; drop one")
    path = pathlib.Path(FLAGS.checkpoint).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint} has no config.json; name the folder "
            "that `python -m convert` wrote"
        )
    return path.name, ModelConfig.load(path / "config.json"), str(path)


def read_load(config: ModelConfig) -> Load:
    """Return what the servers are to do."""
    numbers = ("prompt_len", "new_tokens", "requests", "rounds", "timeout_s")
    values = {name: FLAGS[name].value for name in numbers}
    wrong = [f"--{name} is {value}" for name, value in values.items() if not value or value < 1]
    if wrong:
        raise InputError(f"{', '.join(wrong)}, expected 1 or more")
    needed, most = FLAGS.prompt_len + FLAGS.new_tokens, config.max_seq_len
    if needed > most:
        raise InputError(f"--prompt_len needs {needed:,} positions, the shape has {most:,}")
    if FLAGS.context is not None and not needed <= FLAGS.context <= most:
        raise InputError(f"--context is {FLAGS.context:,}, expected {needed:,} to {most:,}")
    if FLAGS.gap is not None and not 1 <= FLAGS.gap < most:
        raise InputError(f"--gap needs {FLAGS.gap:,} positions, the shape has {most:,}")
    if FLAGS.gap is not None and read_numbers("slots")[-1] < 2:
        raise InputError("--gap needs --slots of 2 at least: one streams while another reads")
    points = make_points(read_numbers("clients"), FLAGS.rate, FLAGS.requests, shared=FLAGS.shared)
    return Load(
        tuple(points),
        FLAGS.prompt_len,
        FLAGS.new_tokens,
        FLAGS.rounds,
        FLAGS.timeout_s,
        FLAGS.seed,
        FLAGS.batch,
        FLAGS.gap,
    )


def read_peers() -> list[str]:
    """Return the peers, each of which can run here.

    Raises:
        InputError: one is unknown, or something that it needs is not installed.
    """
    for name in FLAGS.against:
        if name not in PEERS:
            raise InputError(f"--against names {name!r}, expected {', '.join(PEERS)}")
        missing = [m for m in PROGRAMS[name].modules if importlib.util.find_spec(m) is None]
        if missing:
            raise InputError(
                f"--against={name} needs {' and '.join(missing)}, not installed; "
                "pip install -e '.[bench]'"
            )
    if "llama-server" in FLAGS.against and shutil.which(FLAGS.llama_server) is None:
        raise InputError(f"--llama_server={FLAGS.llama_server} is no program; name llama.cpp's")
    return list(dict.fromkeys(FLAGS.against))


def make_launches(
    config: ModelConfig, checkpoint: str | None, folder: pathlib.Path
) -> list[Launch]:
    """Return the servers to start: ours at every number of slots, peers at the most."""
    slots = read_numbers("slots")
    dtype = parse_dtype(FLAGS.dtype, "--dtype")
    context = FLAGS.context or FLAGS.prompt_len + FLAGS.new_tokens
    ours = [Launch("ours", dtype, config, checkpoint, folder, n, context) for n in slots]
    binary = shutil.which(FLAGS.llama_server)
    peers = [
        Launch(name, dtype, config, None, folder, slots[-1], context, binary)
        for name in read_peers()
    ]
    return [*ours, *peers]


def write_files(launches: list[Launch], folder: pathlib.Path) -> None:
    """Write what the servers read, each file once."""
    vocabulary.write_sentencepiece(folder / "tokenizer.model", launches[0].config.vocab_size)
    for launch in launches:
        write = PROGRAMS[launch.program].write
        if write is not None and not launch.weights.exists():
            note(f"writing weights for {launch}")
            write(launch.weights, launch.config, launch.dtype)


def run() -> int:
    """Measure what the flags say; return the exit status."""
    model, config, checkpoint = read_model()
    load = read_load(config)
    today = datetime.datetime.now().astimezone()
    name = FLAGS.name or slug(f"serve {model} {machine.cpu_name()} {today:%Y-%m-%d}")
    output = output_folder(FLAGS.output, name)
    with tempfile.TemporaryDirectory(prefix="benchmarks_") as folder:
        launches = make_launches(config, checkpoint, pathlib.Path(folder))
        write_files(launches, pathlib.Path(folder))
        measured = measure(launches, load, output / f"{name}.log")
    about = {
        "model": model,
        "command": command_line("benchmarks.serve", sys.argv[1:]),
        "date": today.isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "weights": "checkpoint" if checkpoint else "random",
    }
    record = make_record(config, load, measured, about)
    (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(make_report(record))
    note(f"\nwritten: {output / name}.json")
    if importlib.util.find_spec("matplotlib") is None:
        note("no plot: matplotlib is not installed; pip install -e '.[bench]'")
    elif record["points"]:
        from benchmarks.load.plot import draw_serving

        draw_serving(record).savefig(output / f"{name}.png")
        note(f"written: {output / name}.png")
    if measured.failures:
        note(f"what the servers printed is in {output / name}.log")
    return 1 if measured.failures else 0


def main(argv: list[str]) -> None:
    """Parse the command line, run, and exit."""
    execute(run, FLAGS, argv)


if __name__ == "__main__":
    main(sys.argv)
