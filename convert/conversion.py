"""A conversion: from published weights, a tokenizer and an adapter to a checkpoint."""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from convert import adapter, huggingface, meta, published, source, vocabulary
from convert.console import report
from convert.vocabulary import Vocabulary
from llama_jax.errors import InputError
from llama_jax.progress import progress_bar
from llama_jax.text.tokenizer import EOS_ID, Tokenizer
from llama_jax.weights.atomic_directory import check_absent, partial_folder
from llama_jax.weights.checkpoint import save_checkpoint
from llama_jax.weights.manifest import file_sizes
from llama_jax.weights.shards import Tensor

MAX_SEQ_LEN = 4096
"""Llama 2's context."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is converted, and how; the command line's options have the same names."""

    layout: str
    """meta or hf."""
    src: pathlib.Path
    dst: pathlib.Path
    dtype: str = "source"
    saturate: bool = False
    tokenizer: pathlib.Path | None = None
    """None: the source's; the path "none": none."""
    eos_tokens: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    adapter: pathlib.Path | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where `src` is from, for the manifest."""
    adapter_origin: dict[str, Any] = dataclasses.field(default_factory=dict)


class Written(NamedTuple):
    """What a conversion wrote."""

    parameters: int
    dtype: str
    size: int
    """Bytes of weights."""
    takes_text: bool
    rounding: Counter[str]
    """How values changed in a narrower dtype, by `source.ROUNDING`."""


def convert(task: Conversion, *, progress: bool = True) -> Written:
    """Write a checkpoint of a published model's weights.

    Args:
        task: what to convert.
        progress: show bars on stderr.

    Raises:
        InputError: the source cannot be converted, or the destination cannot be written.
        OSError: the disk is full.
    """
    check_destination(task.dst)
    opened, found = _open(task)
    dtype = source.target_dtype(opened, task.dtype)
    for difference in published.differences(opened.config):
        report(f"warning: {difference}: right only if the weights were trained so")
    count = sum(math.prod(opened.headers[name].shape) for name in opened.names.values())
    total = count * jnp.dtype(dtype).itemsize
    check_room(task.dst, total)
    _check_published(task.src, found, progress)
    report(f"writing {task.dst}")
    rounding: Counter[str] = collections.Counter()
    params = source.read_params(opened, dtype, saturate=task.saturate)
    save_checkpoint(
        task.dst,
        _with_progress(params, total, len(opened.names), rounding, progress),
        opened.config,
        tokenizer=found and found.model,
        origin=_origin(task, found),
    )
    return Written(count, dtype, total, found is not None, rounding)


def _open(task: Conversion) -> tuple[source.Source, Vocabulary | None]:
    """Open the source folder and find its tokenizer; check both."""
    if task.layout == "meta":
        opened = meta.open_source(task.src, task.max_seq_len or MAX_SEQ_LEN)
        # Meta's download script keeps the models' one tokenizer above their folders.
        folders = [task.src, task.src.resolve().parent]
    else:
        opened = huggingface.open_source(task.src, task.max_seq_len)
        folders = [task.src]
    source.check_tensors(opened)
    if task.adapter:
        opened = adapter.merge(opened, task.adapter)
        folders = [task.adapter, *folders]  # an adapter's tokenizer is what it was trained with
    if task.eos_tokens:
        config = dataclasses.replace(opened.config, eos_tokens=task.eos_tokens)
        opened = dataclasses.replace(opened, config=config)
    config = opened.config
    if task.layout == "meta" and task.max_seq_len is None:
        report(f"assuming --max_seq_len={MAX_SEQ_LEN}, Llama 2's: Meta's files do not give it")
    elif task.max_seq_len is None and config.rope_factor != 1:
        report(
            f"assuming --max_seq_len={config.max_seq_len}: the positions are divided by "
            f"{config.rope_factor:g}"
        )
    if EOS_ID not in config.eos_tokens:
        report(
            f"warning: answers end at {list(config.eos_tokens)}, without Llama 2's {EOS_ID}: the "
            "chat format here is Llama 2's"
        )
    return opened, _find_vocabulary(task, folders, config.vocab_size)


def _find_vocabulary(
    task: Conversion, folders: Sequence[pathlib.Path], rows: int
) -> Vocabulary | None:
    """Read the tokenizer that was named, or the first one in the folders."""
    places = [folder / name for folder in folders for name in vocabulary.FILES]
    # A broken link is there too, and refused by its reader.
    file = task.tokenizer or next((place for place in places if os.path.lexists(place)), None)
    if file is None or file == pathlib.Path("none"):
        report(
            f"warning: no tokenizer.model or tokenizer.json in {task.src}: the checkpoint will "
            "take token ids only; `python -m convert tokenizer` adds one later"
        )
        return None
    found = vocabulary.read_vocabulary(file, rows, huggingface.pad_token(task.src))
    if file.parent != task.src:
        report(f"{file.name} is taken from {file.parent}")
    for token, text in found.left_out.items():
        report(f"warning: the added token {text!r} ({token}) has no embedding: it is left out")
    if unnamed := rows - Tokenizer(found.model).vocab_size:
        report(f"the last {unnamed} ids have no text: they are never generated")
    return found


def _origin(task: Conversion, found: Vocabulary | None) -> dict[str, Any]:
    """Describe the sources for the manifest."""
    origin: dict[str, Any] = {"format": task.layout} | task.origin
    if task.adapter:
        origin["adapter"] = task.adapter_origin | adapter.describe(task.adapter)
    if found:
        origin["tokenizer"] = found.describe()
    return origin


def check_destination(path: pathlib.Path) -> None:
    """Refuse a folder that cannot be made, before any work is done."""
    check_absent(path)
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be made: {parent} is no folder that you can write to")


def check_room(path: pathlib.Path, size: int) -> None:
    """Refuse a folder whose disk has less room than `size` bytes."""
    free = shutil.disk_usage(_existing_parent(path)).free
    free += sum(file_sizes(partial_folder(path)).values())  # a killed run's files will be removed
    if free < size:
        raise InputError(
            f"{path} needs {size:,} bytes, but its disk has {free:,} left; make room, or name a "
            "folder on another disk"
        )


def _existing_parent(path: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_published(folder: pathlib.Path, found: Vocabulary | None, progress: bool) -> None:
    """Compare Meta's files with Meta's checksums, if the source has them."""
    lists = [folder / "checklist.chk"]
    if found is not None:
        lists.append(found.file.parent / "tokenizer_checklist.chk")
    for path in lists:
        if path.exists():
            count = published.check_list(path, progress=progress)
            report(f"{path.name}: {count} file{'s' * (count > 1)} as published")


def _with_progress(
    params: Iterable[Tensor], total: int, count: int, rounding: Counter[str], progress: bool
) -> Iterator[Tensor]:
    """Pass tensors on; show the progress and add up how their values changed."""
    with progress_bar(total=total, unit="B", label="converting", shown=progress) as bar:
        numbers = itertools.count(1)  # enumerate would hold on to the tensor
        for tensor in params:
            bar.set_postfix_str(f"{next(numbers)}/{count} {tensor.path}", refresh=False)
            rounding.update(tensor.notes.get("rounding", {}))
            size = tensor.array.nbytes
            yield tensor
            del tensor  # before the next is read
            bar.update(size)
