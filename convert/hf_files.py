"""The files of weights in a Hugging Face folder: which there are, and which tensor is in which."""

import fnmatch
import os
import pathlib
import re
from typing import NamedTuple

from convert.corruption import abbreviate
from convert.state_dict import plain_names
from convert.tensors import Header, read_headers
from llama_jax.errors import InputError
from llama_jax.strict_json import read_json

KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""In the order that transformers prefers."""

PATTERNS = tuple(f"{stem}*{suffix}" for stem, suffix in KINDS)

_LONGEST_NAME = 255  # bytes, on all common file systems
_MOST_SHARDS = 10_000  # of the whole set, which is listed to name what is missing


class Stored(NamedTuple):
    """Where a tensor is."""

    path: pathlib.Path
    name: str
    """In the file."""
    header: Header


def is_weights(name: str) -> bool:
    """Tell whether a file's name is one of weights."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def is_file_name(name: str) -> bool:
    """Tell whether a text from a file is the name of one beside it, not a path and not too long."""
    beside = pathlib.PurePath(name).name == name and name not in ("", "..")
    return beside and len(name.encode(errors="replace")) <= _LONGEST_NAME


def read_all_headers(folder: pathlib.Path) -> dict[str, Stored]:
    """Return every tensor of a folder, by its name in transformers' LlamaForCausalLM.

    Raises:
        InputError: a file is missing or corrupted, or the files contradict each other.
    """
    placed: dict[str, tuple[pathlib.Path, Header]] = {}
    for stem, suffix in KINDS:
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if os.path.lexists(whole):  # a broken link is to be named, not passed over
            placed = {name: (whole, header) for name, header in read_headers(whole).items()}
        elif os.path.lexists(index):
            placed = _read_indexed(index)
        elif shards := sorted(folder.glob(f"{stem}-*{suffix}")):
            placed = _read_numbered(folder, stem, suffix, shards)
        if placed:
            break
    else:
        raise InputError(f"{folder} has no {' or '.join(PATTERNS)}; name the folder of the weights")
    return {
        plain: Stored(placed[name][0], name, placed[name][1])
        for plain, name in plain_names(placed, str(folder)).items()
    }


def _read_indexed(index: pathlib.Path) -> dict[str, tuple[pathlib.Path, Header]]:
    files = _weight_map(index)
    paths = {name: index.parent / name for name in sorted(set(files.values()))}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        raise InputError(
            f"{index} names files that are missing: {abbreviate(missing)}; download them"
        )
    headers = {file: read_headers(path) for file, path in paths.items()}
    held = {(name, file) for file, tensors in headers.items() for name in tensors}
    problems = [f"{name} is not in {file}" for name, file in sorted(files.items() - held)]
    problems += [
        f"{file} holds {name}, which the index places in {files.get(name, 'no file')}"
        for name, file in sorted(held - files.items())
        if plain_names([name], file)  # a buffer may be in several
    ]
    if problems:
        raise InputError(
            f"{index} does not match its files: {abbreviate(problems)}; "
            "download the whole folder again"
        )
    return {name: (paths[file], headers[file][name]) for name, file in files.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index} has no weight_map; download it again")
    unexpected = [
        f"{file!r:.80}"
        for file in files.values()
        if not isinstance(file, str) or not is_file_name(file)
    ]
    if unexpected:
        raise InputError(
            f"{index}: weight_map names {abbreviate(unexpected)}, expected files beside it"
        )
    return files


def _read_numbered(
    folder: pathlib.Path, stem: str, suffix: str, shards: list[pathlib.Path]
) -> dict[str, tuple[pathlib.Path, Header]]:
    """Read shards whose index is missing: their names say how many there are."""
    counts = {re.search(r"-of-(\d+)$", path.stem) for path in shards}
    numbers = {int(match.group(1)) if match else 0 for match in counts}
    count = max(numbers)
    if count > _MOST_SHARDS:
        raise InputError(
            f"{folder}: a shard's name says that there are {count!r:.20}, expected at most "
            f"{_MOST_SHARDS:,}; download the whole folder again"
        )
    width = len(re.split("-", shards[0].stem)[-1])
    expected = [f"{stem}-{i:0{width}}-of-{count:0{width}}{suffix}" for i in range(1, count + 1)]
    missing = sorted({*expected} - {path.name for path in shards})
    unexpected = sorted({path.name for path in shards} - {*expected})
    if missing or unexpected:
        problems = [f"unexpected {name}" for name in unexpected]
        problems += [f"missing {name}" for name in missing]
        raise InputError(
            f"{folder}: the shards are not one whole set: {abbreviate(problems)}; download the "
            "whole folder again"
        )
    placed: dict[str, tuple[pathlib.Path, Header]] = {}
    for path in shards:
        for name, header in read_headers(path).items():
            if name in placed and plain_names([name], path.name):
                raise InputError(
                    f"{path} and {placed[name][0].name} both hold {name}; download "
                    f"{stem}{suffix}.index.json too, which says which one counts"
                )
            placed[name] = path, header
    return placed
