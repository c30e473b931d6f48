"""Strict JSON: for files that people edit, and for requests from outside."""

import collections
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from llama_jax.errors import InputError
from llama_jax.regular_file import read_regular

_MAX_DEPTH = 64
_MAX_DIGITS = 1000
_TOO_DEEP = f"nested deeper than {_MAX_DEPTH}"
_REMEDY = "fix it or write it again"
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def parse_json(
    text: str | bytes, source: str, *, remedy: str = _REMEDY, max_containers: int | None = None
) -> Any:
    """Parse JSON strictly.

    NaN, infinities and numbers too large for a double are refused: Python's parser takes them, and
    JSON does not have them. A key given twice in one object would lose a value. Nesting deeper than
    64 could exhaust the stack.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.
        source: where it is from, for the error.
        remedy: what to do, for the error.
        max_containers: objects and arrays at most; None: any number. A million of them, in some
            megabytes, would take 0.6 s in which no other thread runs.

    Raises:
        InputError: naming `source` and what is wrong.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if max_containers is not None:
            _check_containers(text, max_containers)
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        fault = _TOO_DEEP if isinstance(error, RecursionError) else error
        raise InputError(f"{source}: not JSON ({fault}); {remedy}") from None
    return value


def _check_containers(text: str, most: int) -> None:
    """Raise ValueError for more objects and arrays than `most`, before they are made."""
    count = text.count("[") + text.count("{")
    if count > most:  # those within strings do not count
        outside = _STRING.sub("", text)
        count = outside.count("[") + outside.count("{")
    if count > most:
        raise ValueError(f"{count:,} objects and arrays, expected at most {most:,}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r:.40} is given twice")
    return values


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:  # well below Python's limit: sums must be printable too
        raise ValueError(f"the number {text:.20}... is too large")
    return int(text)


def _number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check_depth(value: Any) -> None:
    """Raise ValueError for nesting so deep that recursion over it could exhaust the stack."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [child for item in level for child in _children(item)]
    raise ValueError(_TOO_DEEP)


def _children(item: dict | list) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def read_json(path: pathlib.Path, *, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read a JSON object from a file; `remedy` says what to do about another content.

    Raises:
        InputError: the file cannot be read, is larger than TEXT_BYTES, or holds something else.
    """
    try:
        text = read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot read it ({reason}); check the path and its permissions"
        ) from None
    values = parse_json(text, str(path), remedy=remedy)
    if not isinstance(values, dict):
        raise InputError(f"{path}: got a {type(values).__name__}, expected a JSON object; {remedy}")
    return values
