"""What the command lines of this package share: their flags, files and exit statuses."""

import json
import pathlib
import re
import shlex
import sys
from collections.abc import Callable

from absl import flags, logging

from benchmarks.cases import parse_dtype
from benchmarks.limits import Limits
from benchmarks.measure import measure_limits
from benchmarks.worker import EngineError
from llama_jax.errors import InputError


def command_line(module: str, arguments: list[str]) -> str:
    """Return a command for a record: of absolute paths, which are nobody else's, the last part."""
    shown = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        path = pathlib.PurePath(value if equals else argument)
        if path.is_absolute():
            argument = f"{flag}={path.name}" if equals else path.name
        shown.append(argument)
    return shlex.join(["python", "-m", module, *shown])


def make_flags() -> flags.FlagValues:
    """Return the flags that every command has: a set of its own, run.py has some of the names."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "output", "benchmarks/results", "Folder for the files to write.", flag_values=values
    )
    flags.DEFINE_string(
        "name", None, "Of the files; default: shape, processor and date.", flag_values=values
    )
    flags.DEFINE_string(
        "limits",
        None,
        "File of what `python -m benchmarks.limits` printed; default: measured now.",
        flag_values=values,
    )
    return values


def note(text: str) -> None:
    """Say something to the person, not to the pipe."""
    print(text, file=sys.stderr, flush=True)


def execute(run: Callable[[], int], values: flags.FlagValues, argv: list[str]) -> None:
    """Parse a command line, run, and exit with the status that `run` returns.

    A mistake in the input becomes one line and exit 2.
    """
    logging.set_verbosity(logging.WARNING)
    if {"--help", "-h"} & set(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n{values.get_help()}")
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


def read_dtypes(texts: list[str]) -> list[str]:
    """Return the dtypes that --dtype names.

    Raises:
        InputError: none, or one that cannot be measured.
    """
    if not texts:
        raise InputError("--dtype is empty, expected float16, bfloat16 or float32")
    return list(dict.fromkeys(parse_dtype(text, "--dtype") for text in texts))


def read_limits(path: str | None) -> Limits:
    """Return the machine's limits: from the file of --limits, or measured now.

    Raises:
        InputError: the file cannot be read.
        EngineError: measuring failed.
    """
    if path is None:
        note("measuring the machine's limits")
        return measure_limits()
    try:
        return Limits(**json.loads(pathlib.Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"--limits={path}: {error}; name a file of what `python -m benchmarks.limits` printed"
        ) from None


def slug(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def output_folder(path: str, name: str) -> pathlib.Path:
    """Return the folder of --output, which exists then; `name` is to be part of files' names.

    Raises:
        InputError: the folder cannot be made, or the name is none.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"--name is {name!r}, expected letters, digits, dots and hyphens")
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={path}: {error.strerror}; name a folder") from None
    return folder
