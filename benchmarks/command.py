"""What the commands of this package share: flags, their values, records and exit statuses."""

import datetime
import importlib.util
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from benchmarks import machine
from benchmarks.model_cost import ITEM_BYTES
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.worker import EngineError
from llama_jax.config import ModelConfig
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError


def make_flags(shape: str) -> flags.FlagValues:
    """Return the flags that every command has: a set of its own, run.py has some of the names."""
    values = flags.FlagValues()
    text = f"Model shape: {', '.join(SHAPES)}; with random weights, except for demo."
    flags.DEFINE_string("shape", shape, text, flag_values=values)
    text = "Folder for the files to write."
    flags.DEFINE_string("output", "benchmarks/results", text, flag_values=values)
    text = "Name of the files; default: made of what is measured, processor and date."
    flags.DEFINE_string("name", None, text, flag_values=values)
    return values


def add_checkpoint_flag(values: flags.FlagValues) -> None:
    """Define --checkpoint."""
    text = "Folder written by `python -m convert`; replaces --shape."
    flags.DEFINE_string("checkpoint", None, text, flag_values=values)


def read_model(values: flags.FlagValues) -> tuple[str, ModelConfig, str | None]:
    """Return the model's name, its shape and the folder of its weights; None: random ones."""
    if values.checkpoint is None:
        path = str(DEMO_CHECKPOINT) if values.shape == "demo" else None
        return values.shape, load_shape(values.shape), path
    if values["shape"].present:
        raise InputError("--shape is given with --checkpoint, which has its own; drop one")
    path = pathlib.Path(values.checkpoint).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise InputError(
            f"--checkpoint={values.checkpoint} has no config.json; name the folder "
            "that `python -m convert` wrote"
        )
    return path.name, ModelConfig.load(path / "config.json"), str(path)


def read_numbers(values: flags.FlagValues, flag: str) -> list[int]:
    """Return the whole numbers of a list flag, each once, in order; it may be empty."""
    texts = values[flag].value or []
    for text in texts:
        if not re.fullmatch(r"[1-9]\d{0,8}", text):
            raise InputError(f"--{flag} has {text!r}, expected whole numbers from 1 on")
    return sorted({int(text) for text in texts})


def check_positive(values: flags.FlagValues, *names: str) -> None:
    """Raise InputError if a flag is below 1."""
    wrong = [f"--{name} is {values[name].value}" for name in names if (values[name].value or 0) < 1]
    if wrong:
        raise InputError(f"{', '.join(wrong)}, expected 1 or more")


def check_room(config: ModelConfig, positions: int) -> None:
    """Raise InputError if the shape has fewer positions than are needed."""
    if positions > config.max_seq_len:
        raise InputError(
            f"{positions:,} positions are needed, the shape has {config.max_seq_len:,}"
        )


def check_dtype(text: str, flag: str = "--dtype") -> str:
    """Return a dtype given by a flag."""
    if text not in ITEM_BYTES:
        raise InputError(f"{flag} has the dtype {text!r}, expected {', '.join(ITEM_BYTES)}")
    return text


def check_modules(what: str, modules: tuple[str, ...]) -> None:
    """Raise InputError if a module that a command or a flag's value needs is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{what} needs {' and '.join(missing)}, not installed; pip install -e '.[bench]'"
        )


def note(text: str) -> None:
    """Print a line to stderr: for the person, not for the pipe."""
    print(text, file=sys.stderr, flush=True)


def execute(run: Callable[[], int], values: flags.FlagValues, argv: list[str]) -> None:
    """Parse a command line, run, and exit with the status that `run` returns.

    A mistake in the input becomes one line and exit status 2.
    """
    logging.set_verbosity(logging.WARNING)
    if {"--help", "-h"} & set(argv[1:]):
        print(f"{sys.modules[run.__module__].__doc__}\n{values.get_help()}")
        sys.exit(0)
    try:
        _, *extra = values(argv)
        if extra:
            raise InputError(f"got the argument {extra[0]!r}, expected flags only")
        sys.exit(run())
    except flags.Error as error:
        note(f"error: {_one_line(error).removeprefix('ERROR:: ')}; see --help")
        sys.exit(2)
    except InputError as error:
        note(f"error: {_one_line(error)}")
        sys.exit(2)
    except EngineError as error:
        note(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        note("\nstopped")
        sys.exit(130)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def command_line(module: str, arguments: list[str]) -> str:
    """Return a command for a record; of an absolute path only the last part is kept."""
    shown = [re.sub(r"(^|=)/\S*?([^/]*)$", r"\1\2", argument) for argument in arguments]
    return shlex.join(["python", "-m", module, *shown])


def start_record(module: str, model: str, weights: str | None) -> dict[str, Any]:
    """Return the head of a record: the command, the date and the machine."""
    return {
        "model": model,
        "command": command_line(module, sys.argv[1:]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "weights": "checkpoint" if weights else "random",
    }


def output_path(values: flags.FlagValues, *default: str) -> pathlib.Path:
    """Return the path of the files to write, without an ending; its folder exists then."""
    text = " ".join([*default, str(datetime.date.today())]).lower()
    name = values.name if values.name is not None else re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"--name is {name!r}, expected letters, digits, dots and hyphens")
    folder = pathlib.Path(values.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={values.output}: {error.strerror}; name a folder") from None
    return folder / name


def write_record(record: dict[str, Any], path: pathlib.Path, *, plot: bool = True) -> None:
    """Write a record as PATH.json and, if matplotlib is installed, its plot as PATH.png."""
    text = json.dumps(record, indent=1) + "\n"
    path.with_name(f"{path.name}.json").write_text(text, encoding="utf-8")
    note(f"\nwritten: {path}.json")
    if plot and importlib.util.find_spec("matplotlib") is None:
        note("no plot: matplotlib is not installed; pip install -e '.[bench]'")
    elif plot:
        from benchmarks.plot import draw

        draw(record).savefig(f"{path}.png")
        note(f"written: {path}.png")
