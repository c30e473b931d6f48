"""Merge a LoRA adapter, in PEFT's format, into the weights of its base model."""

import dataclasses
import hashlib
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from convert import source
from convert.corruption import abbreviate
from convert.tensors import Header, read_headers
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, one_line
from llama_jax.regular_file import read_regular
from llama_jax.strict_json import read_json
from llama_jax.weights.dtypes import DTYPES

CONFIG = "adapter_config.json"
KINDS = (("adapter_model", ".safetensors"), ("adapter_model", ".bin"))
"""In the order that PEFT prefers."""

_FILES = tuple(stem + suffix for stem, suffix in KINDS)

_MERGED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type"),
}
"""Settings of training, or of where the tensors are, which their names say. PEFT ignores
fan_in_fan_out in linear layers."""
_CHECKED = {"bias", "init_lora_weights"}
_SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initial values of A and B; other kinds (PiSSA, OLoRA, ...) change the base weights too."""

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBED = "model.embed_tokens.weight"
_REMEDY = "merge it with peft's merge_and_unload() and convert the merged model"
_LARGEST = 2**31  # rank or alpha
_ROWS = 1024  # of a weight, merged at a time


class _Pair(NamedTuple):
    """What is added to one weight: scale * B @ A."""

    a: str
    """The tensor's name in the adapter's file; of shape [rank, inputs]."""
    b: str
    """[outputs, rank]."""
    scale: float


def merge(opened: source.Source, folder: pathlib.Path) -> source.Source:
    """Return a source whose weights have an adapter merged in, in float32.

    A LoRA pair adds scale * B @ A, where scale is alpha / r, or alpha / sqrt(r) with use_rslora. A
    whole tensor in the adapter (PEFT's modules_to_save) replaces the base model's. Both embeddings
    of another size than the base model's change its vocabulary.

    Args:
        opened: the base model, with transformers' names; its tensors are checked.
        folder: of adapter_config.json and adapter_model.safetensors or .bin.

    Raises:
        InputError: naming what cannot be merged.
    """
    values = _read_config(folder)
    file = _find_file(folder)
    headers = read_headers(file)
    sides, whole = _sort(file, headers, set(opened.names.values()))
    if opened.config.tie_embeddings and _EMBED in {*sides, *whole}:
        raise InputError(f"{folder} changes {_EMBED}, which is the output layer too; {_REMEDY}")
    pairs = _pairs(folder, values, headers, sides, opened.headers)
    config, replaced = _replaced(folder, headers, whole, opened)

    def read(path: str) -> tuple[np.ndarray, list[source.Part]]:
        name = opened.names[path]
        if name in whole:
            array, part = source.read_part(file, whole[name])
            return array, [part]
        array, parts = opened.read(path)
        if name not in pairs:
            return array, parts
        (a, part_a), (b, part_b) = (source.read_part(file, side) for side in pairs[name][:2])
        return _add(array, a, b, pairs[name].scale), [*parts, part_a, part_b]

    return dataclasses.replace(opened, config=config, headers=opened.headers | replaced, read=read)


def describe(folder: pathlib.Path) -> dict[str, Any]:
    """Return the digest of an adapter's config, for a manifest.

    The digests of its tensors are among the `sources` of what they were merged into.
    """
    config = read_regular(folder / CONFIG)
    return {"config_sha256": hashlib.sha256(config).hexdigest()}


def _add(array: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Return array + scale * b @ a in float32."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    merged = np.empty(array.shape, np.float32)
    for i in range(0, len(merged), _ROWS):
        rows = slice(i, i + _ROWS)
        merged[rows] = array[rows].astype(np.float32) + np.float32(scale) * (b[rows] @ a)
    return merged


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return adapter_config.json; refuse what cannot be merged."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        several = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; it holds several adapters ({abbreviate(several)}): name one" if several else ""
        raise InputError(f"{folder} has no {CONFIG}, expected a folder that PEFT saved{hint}")
    values = read_json(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder} is an adapter of type {kind!r:.40}, expected 'LORA'; {_REMEDY}")
    problems = [
        f"{key} is {values[key]!r:.60}"
        for key in sorted(values.keys() - _MERGED - _NEUTRAL - _CHECKED)
        if values[key]
    ]
    if values.get("bias", "none") != "none":
        problems.append(f"bias is {values['bias']!r:.40}, expected 'none'")
    if values.get("init_lora_weights", True) not in _SAME_BASE:
        problems.append(
            f"init_lora_weights is {values['init_lora_weights']!r:.40}, which changes the base "
            "weights"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_pattern, patterns)):
            problems.append(
                f"{key} is {patterns!r:.40}, expected regular expressions with few "
                "repetitions, and values"
            )
    if problems:
        raise InputError(f"{path}: {one_line(problems)}; {_REMEDY}")
    return values


def _is_pattern(text: str) -> bool:
    """Whether this is a regular expression of a module's name, quick to match.

    PEFT writes names, and people `layers\\.[0-9]+\\.` and the like. Repeated groups, and many
    repetitions, can take longer than anybody waits.
    """
    if len(text) > 1000 or re.search(r"\)[*+?{]", text) or len(re.findall("[*+?{]", text)) > 3:
        return False
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _find_file(folder: pathlib.Path) -> pathlib.Path:
    found = [folder / name for name in _FILES if (folder / name).exists()]
    if not found:
        raise InputError(f"{folder} has no {' or '.join(_FILES)}; download the whole adapter again")
    return found[0]


def _sort(
    file: pathlib.Path, headers: dict[str, Header], known: set[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the names of the pairs, by weight and side, and those of whole tensors, by weight."""
    sides: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    adapters, unknown = set(), []
    for name in headers:
        if match := _LORA.fullmatch(name):
            weight = f"{match['module'].removeprefix(_PREFIX)}.weight"
            adapters.add(match["adapter"])
            sides.setdefault(weight, {})[match["side"]] = name
        else:
            weight = re.sub(r"\.modules_to_save(\.default)?", "", name.removeprefix(_PREFIX))
            whole[weight] = name
        if weight not in known:
            unknown.append(name)
    if len(adapters) > 1:
        several = abbreviate(sorted(str(adapter) for adapter in adapters))
        raise InputError(f"{file} holds several adapters ({several}); save one alone")
    if unknown:
        raise InputError(
            f"{file}: {abbreviate(sorted(unknown))} belongs to no weight of the base model that "
            f"can be merged; give the adapter's own base model, or {_REMEDY}"
        )
    if not headers:
        raise InputError(f"{file} holds no tensors; download the whole adapter again")
    return sides, whole


def _pairs(
    folder: pathlib.Path,
    values: dict[str, Any],
    headers: dict[str, Header],
    sides: dict[str, dict[str, str]],
    base: dict[str, Header],
) -> dict[str, _Pair]:
    """Return the pair for each weight, with its scale; check ranks, shapes and dtypes."""
    pairs: dict[str, _Pair] = {}
    problems = []
    for weight, names in sides.items():
        if names.keys() != {"A", "B"}:
            problems.append(
                f"{weight} has lora_{'/'.join(names)} alone, expected lora_A and lora_B"
            )
            continue
        module = weight.removesuffix(".weight")
        rank = _by_pattern(values.get("rank_pattern"), module, values.get("r"))
        alpha = _by_pattern(values.get("alpha_pattern"), module, values.get("lora_alpha"))
        a, b = headers[names["A"]], headers[names["B"]]
        if not _is_scale(rank, alpha):
            problems.append(f"{module} has r {rank!r:.20} and lora_alpha {alpha!r:.20}")
            continue
        shape = base[weight].shape
        if len(shape) != 2 or (a.shape, b.shape) != ((rank, shape[1]), (shape[0], rank)):
            problems.append(
                f"{module} is {list(shape)} and r is {rank}, but lora_A is {list(a.shape)} and "
                f"lora_B {list(b.shape)}"
            )
        problems += [
            f"{name} is {headers[name].dtype}, expected {', '.join(DTYPES)}"
            for name in names.values()
            if headers[name].dtype not in DTYPES
        ]
        root = math.sqrt(rank) if values.get("use_rslora") else rank
        pairs[weight] = _Pair(names["A"], names["B"], alpha / root)
    if problems:
        raise InputError(
            f"{folder} does not fit the base model: {abbreviate(problems)}; give the adapter's own "
            "base model, or download the adapter again"
        )
    return pairs


def _is_scale(rank: Any, alpha: Any) -> bool:
    """Whether these are a rank and an alpha whose quotient float32 holds."""
    ranks = type(rank) is int and 1 <= rank < _LARGEST
    return ranks and type(alpha) in (int, float) and abs(alpha) < _LARGEST


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends a module's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _replaced(
    folder: pathlib.Path, headers: dict[str, Header], whole: dict[str, str], opened: source.Source
) -> tuple[ModelConfig, dict[str, Header]]:
    """Return the config and headers with the adapter's whole tensors, under the base's dtype."""
    replaced: dict[str, Header] = {}
    problems = []
    for weight, name in whole.items():
        found, base = headers[name], opened.headers[weight]
        resized = weight in (_EMBED, "lm_head.weight") and found.shape[1:] == base.shape[1:]
        if (found.shape != base.shape and not resized) or found.dtype not in DTYPES:
            problems.append(
                f"{name} is {list(found.shape)} {found.dtype}, expected {list(base.shape)}"
            )
        replaced[weight] = Header(found.shape, base.dtype)
    rows = {
        name: replaced.get(name, opened.headers[name]).shape[0]
        for name in (_EMBED, "lm_head.weight")
        if name in opened.names.values()
    }
    if len({*rows.values()}) > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in rows.items())
        problems.append(f"the vocabularies differ ({sizes}), expected one size")
    if problems:
        raise InputError(f"{folder} does not fit the base model: {abbreviate(problems)}; {_REMEDY}")
    return dataclasses.replace(opened.config, vocab_size=rows[_EMBED]), replaced
