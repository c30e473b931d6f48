"""Source: requests that Ray's readers read, from Parquet or from a URL, as a file of JSON lines."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import ray.data
import ray.exceptions

from llama_jax.errors import InputError

_NATIVE = ("s3://", "gs://", "hdfs://")
"""Schemes that Arrow opens itself; fsspec opens the others."""

_TEXT = (".json", ".jsonl", ".ndjson", ".txt")
"""What JSON lines are called; all else is Parquet."""


def is_for_readers(name: str) -> bool:
    """Return whether a name is of something that Ray's readers read: Parquet, or a URL."""
    return "://" in name or name.endswith(".parquet")


@contextlib.contextmanager
def spooled(name: str) -> Iterator[pathlib.Path]:
    """Copy requests into a temporary file meanwhile, in their order; Ray must run.

    A row of Parquet becomes an object of its columns, without those that are null. Other files are
    JSON lines, which stay as they are.

    Args:
        name: a file or a folder of Parquet, or a URL of it or of JSON lines.

    Raises:
        InputError: it cannot be read, or a column has what JSON has not.
    """
    with tempfile.TemporaryDirectory(prefix="llama_jax_") as folder:
        path = pathlib.Path(folder) / "requests.jsonl"
        try:
            with path.open("wb") as file:
                _copy(name, file)
        except (OSError, ValueError, ImportError, pa.ArrowException) as error:
            raise InputError(f"{name}: {_first_line(error)}; name another file") from None
        except ray.exceptions.RayError as error:
            raise InputError(f"{name} cannot be read: {_first_line(error)}") from None
        yield path


def _copy(name: str, file: BinaryIO) -> None:
    filesystem, path = None, name
    if "://" in name and not name.startswith(_NATIVE):
        filesystem, path = fsspec.core.url_to_fs(name)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # a line's number is part of its seed
    with ray.data.DataContext.current(context):
        is_text = path.removesuffix(".gz").endswith(_TEXT)
        if is_text:
            # Each byte is a character of Latin-1: whatever a line has, it comes back.
            lines = ray.data.read_text(
                path, encoding="latin-1", drop_empty_lines=False, filesystem=filesystem
            )
        else:
            lines = ray.data.read_parquet(path, filesystem=filesystem)
    for table in lines.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in cast(pa.Table, table).to_pylist():
            file.write((row["text"].encode("latin-1") if is_text else _line(row)) + b"\n")


def _line(row: dict[str, Any]) -> bytes:
    given = {name: value for name, value in row.items() if value is not None}
    return json.dumps(given, ensure_ascii=False, default=_refuse).encode("utf-8")


def _refuse(value: Any) -> None:
    raise ValueError(f"a column has {type(value).__name__} values, expected what JSON has")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
