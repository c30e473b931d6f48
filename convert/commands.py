"""What each command of `python -m convert` does."""

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
from tqdm import tqdm

from convert import huggingface, meta, published, source, vocabulary
from convert.export import export_hf
from convert.vocabulary import Vocabulary
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import EOS_ID, Tokenizer
from llama_jax.weights import stored_tokenizer
from llama_jax.weights.atomic_directory import check_absent, partial_folder
from llama_jax.weights.checkpoint import open_checkpoint, save_checkpoint, verify_checkpoint
from llama_jax.weights.manifest import file_sizes
from llama_jax.weights.shards import Tensor

MAX_SEQ_LEN = 4096
"""Llama 2's context."""


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint of a published model's weights."""
    _check_destination(args.dst)
    opened, found = _open(args)
    dtype = source.target_dtype(opened, args.dtype)
    for difference in published.differences(opened.config):
        report(f"warning: {difference}: right only if the weights were trained so")
    count = sum(math.prod(opened.headers[name].shape) for name in opened.names.values())
    total = count * jnp.dtype(dtype).itemsize
    _check_room(args.dst, total)
    _check_published(args.src, found)
    report(f"writing {args.dst}")
    rounding: Counter[str] = Counter()
    params = source.read_params(opened, dtype, saturate=args.saturate)
    save_checkpoint(
        args.dst,
        _with_progress(params, total, len(opened.names), rounding),
        opened.config,
        tokenizer=found and found.model,
        origin={"format": args.command, "folder": args.src.resolve().name}
        | ({"tokenizer": found.describe()} if found else {}),
    )

    hint = f"python run.py --checkpoint={shlex.quote(str(args.dst))} --prompt='Hello'"
    size = tqdm.format_sizeof(total, "B")
    print(
        f"wrote {count:,} parameters, {dtype}, {size}, to {args.dst}"
        + (f"; try: {hint}" if found else "")
    )
    if rounding:
        changes = ", ".join(f"{rounding[what]:,} {what}" for what in source.ROUNDING)
        print(f"in {dtype}, of {count:,} values: {changes}; by tensor in manifest.json")


def _open(args: argparse.Namespace) -> tuple[source.Source, Vocabulary | None]:
    """Open the source folder and find its tokenizer; check both."""
    if args.command == "meta":
        opened = meta.open_source(args.src, args.max_seq_len or MAX_SEQ_LEN)
        # Meta's download script keeps the models' one tokenizer above their folders.
        folders = [args.src, args.src.resolve().parent]
    else:
        opened = huggingface.open_source(args.src, args.max_seq_len)
        folders = [args.src]
    if args.eos_tokens:
        config = dataclasses.replace(opened.config, eos_tokens=args.eos_tokens)
        opened = dataclasses.replace(opened, config=config)
    source.check_tensors(opened)
    config = opened.config
    if args.command == "meta" and args.max_seq_len is None:
        report(f"assuming --max_seq_len={MAX_SEQ_LEN}, Llama 2's: Meta's files do not give it")
    elif args.max_seq_len is None and config.rope_factor != 1:
        report(
            f"assuming --max_seq_len={config.max_seq_len}: the positions are divided by "
            f"{config.rope_factor:g}"
        )
    if EOS_ID not in config.eos_tokens:
        report(
            f"warning: answers end at {list(config.eos_tokens)}, without Llama 2's {EOS_ID}: the "
            "chat format here is Llama 2's"
        )
    return opened, _find_vocabulary(args, folders, config.vocab_size)


def _find_vocabulary(
    args: argparse.Namespace, folders: Sequence[pathlib.Path], rows: int
) -> Vocabulary | None:
    """Read the tokenizer that was named, or the first one in the folders."""
    places = [folder / name for folder in folders for name in vocabulary.FILES]
    # A broken link is there too, and refused by its reader.
    file = args.tokenizer or next((place for place in places if os.path.lexists(place)), None)
    if file is None or file == pathlib.Path("none"):
        report(
            f"warning: no tokenizer.model or tokenizer.json in {args.src}: the checkpoint will "
            "take token ids only; `python -m convert tokenizer` adds one later"
        )
        return None
    found = vocabulary.read_vocabulary(file, rows, huggingface.pad_token(args.src))
    if file.parent != args.src:
        report(f"{file.name} is taken from {file.parent}")
    for token, text in found.left_out.items():
        report(f"warning: the added token {text!r} ({token}) has no embedding: it is left out")
    if unnamed := rows - Tokenizer(found.model).vocab_size:
        report(f"the last {unnamed} ids have no text: they are never generated")
    return found


def add_tokenizer(args: argparse.Namespace) -> None:
    """Add a tokenizer to a checkpoint that has none."""
    _, config = open_checkpoint(args.dst)
    found = vocabulary.read_vocabulary(args.file, config.vocab_size)
    stored_tokenizer.add_tokenizer(args.dst, found.model)
    print(f"{args.dst} has the tokenizer {args.file} now")


def verify(args: argparse.Namespace) -> None:
    """Compare a checkpoint with the digests of its manifest."""
    root = verify_checkpoint(args.dst, progress=True)
    print(f"{args.dst} is what was written; root {root}")


def export(args: argparse.Namespace) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    _check_destination(args.out)
    values, _ = open_checkpoint(args.dst)
    _check_room(args.out, sum(file["bytes"] for file in values["files"].values()))
    size = export_hf(args.dst, args.out, progress=True)
    print(f"wrote {tqdm.format_sizeof(size, 'B')} to {args.out}, for transformers to load")


def _check_destination(path: pathlib.Path) -> None:
    """Refuse a folder that cannot be made, before any work is done."""
    check_absent(path)
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be made: {parent} is no folder that you can write to")


def _check_room(path: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(_existing_parent(path)).free
    free += sum(file_sizes(partial_folder(path)).values())  # a killed run's files will be removed
    if free < size:
        raise InputError(
            f"{path} needs {size:,} bytes, but its disk has {free:,} left; make room, or name a "
            "folder on another disk"
        )


def _existing_parent(path: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_published(folder: pathlib.Path, found: Vocabulary | None) -> None:
    """Compare Meta's files with Meta's checksums, if the source has them."""
    lists = [folder / "checklist.chk"]
    if found is not None:
        lists.append(found.file.parent / "tokenizer_checklist.chk")
    for path in lists:
        if path.exists():
            count = published.check_list(path, progress=True)
            report(f"{path.name}: {count} file{'s' * (count > 1)} as published")


def _with_progress(
    params: Iterable[Tensor], total: int, count: int, rounding: Counter[str]
) -> Iterator[Tensor]:
    """Pass tensors on; show the progress and add up how their values changed."""
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        numbers = itertools.count(1)  # enumerate would hold on to the tensor
        for tensor in params:
            bar.set_postfix_str(f"{next(numbers)}/{count} {tensor.path}", refresh=False)
            rounding.update(tensor.notes.get("rounding", {}))
            size = tensor.array.nbytes
            yield tensor
            del tensor  # before the next is read
            bar.update(size)


def report(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr)
