"""What the commands of this package share: flags, their values, records and exit statuses."""

import datetime
import importlib.util
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Collection
from typing import Any

from absl import flags, logging

from benchmarks import machine
from benchmarks.model_cost import ITEM_BYTES
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.worker import EngineError
from llama_jax.config import ModelConfig
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError

CHECKPOINT = ("", "Folder written by `python -m convert`; replaces --shape.")
"""Default and help of --checkpoint."""
SERVED = {"checkpoint": CHECKPOINT, "dtype": ("float16", "Of weights and cache.")}
"""What a server is started with, as flags."""
_COMMON = {
    "shape": ("", f"{', '.join(SHAPES)}: with random weights, except for demo."),
    "output": ("benchmarks/results", "Folder for the files to write."),
    "name": ("", "Name of the files; default: what is measured, and the date."),
}


def make_flags(shape: str, **own: tuple[Any, str]) -> flags.FlagValues:
    """Return the flags of a command: a set of its own, run.py has some of the names.

    Args:
        shape: default of --shape.
        own: default and help of each further flag; its type is the default's, integers are > 0.
    """
    values = flags.FlagValues()
    define: dict[type, Callable] = {
        bool: flags.DEFINE_bool,
        int: lambda *about, **to: flags.DEFINE_integer(*about, lower_bound=1, **to),
        list: flags.DEFINE_list,
        str: flags.DEFINE_string,
    }
    for name, (default, text) in (_COMMON | own).items():
        define[type(default)](name, default, text, flag_values=values)
    values.set_default("shape", shape)
    return values


def read_model(values: flags.FlagValues) -> tuple[str, ModelConfig, str | None]:
    """Return the model's name, its shape and the folder of its weights; None: random ones."""
    if not values.checkpoint:
        check_choices("--shape", [values.shape], SHAPES)
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


def check_choices(flag: str, given: Collection[str], choices: Collection[str]) -> None:
    """Raise InputError if a flag has a value that is no choice."""
    for text in given:
        if text not in choices:
            raise InputError(f"{flag} has {text!r}, expected {', '.join(choices)}")


def check_dtypes(given: Collection[str]) -> None:
    """Raise InputError if --dtype has a value that is none."""
    check_choices("--dtype", given, ITEM_BYTES)


def check_room(config: ModelConfig, positions: int) -> None:
    """Raise InputError if the shape has fewer positions than are needed."""
    if positions > config.max_seq_len:
        raise InputError(
            f"{positions:,} positions are needed, the shape has {config.max_seq_len:,}"
        )


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
    except (flags.Error, InputError) as error:
        note(f"error: {' '.join(str(error).split())}; see --help")
        sys.exit(2)
    except EngineError as error:
        note(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        note("\nstopped")
        sys.exit(130)


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
    name = values.name or "-".join([*default, str(datetime.date.today())])
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
    pathlib.Path(f"{path}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    note(f"\nwritten: {path}.json")
    if plot and importlib.util.find_spec("matplotlib") is None:
        note("no plot: matplotlib is not installed; pip install -e '.[bench]'")
    elif plot:
        from benchmarks.plot import draw

        draw(record).savefig(f"{path}.png")
        note(f"written: {path}.png")
