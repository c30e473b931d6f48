"""Read small files that people edit, move and damage."""

import json
import pathlib
from typing import Any

from llama_jax.errors import InputError


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse JSON; an InputError names `source` if it is none, is not UTF-8 or nests too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON ({error}); mend it or write it again") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; an InputError names the file if it cannot be read or is none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    values = parse_json(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: got a {type(values).__name__}, expected a JSON object")
    return values
