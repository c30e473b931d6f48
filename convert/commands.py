"""What each command of `python -m convert` does."""

import argparse
import pathlib
import shlex

from tqdm import tqdm

from convert import adapter, conversion, hub, source, vocabulary
from convert.conversion import Conversion, check_destination, check_room
from convert.export import export_hf
from llama_jax.weights import stored_tokenizer
from llama_jax.weights.checkpoint import open_checkpoint, verify_checkpoint


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint of a published model's weights."""
    check_destination(args.dst)
    if args.command == "hf":
        src, origin = hub.fetch(args.src, args.revision)
    else:
        src = pathlib.Path(args.src)
        origin = {"folder": src.resolve().name}
    adapted, adapter_origin = None, {}
    if args.adapter:
        adapted, adapter_origin = hub.fetch(args.adapter, kinds=adapter.KINDS)
    task = Conversion(
        layout=args.command,
        src=src,
        dst=args.dst,
        dtype=args.dtype,
        saturate=args.saturate,
        tokenizer=args.tokenizer,
        eos_tokens=args.eos_tokens,
        max_seq_len=args.max_seq_len,
        adapter=adapted,
        origin=origin,
        adapter_origin=adapter_origin,
    )
    written = conversion.convert(task)
    count, dtype, size, takes_text, rounding = written
    program = "python run.py" if pathlib.Path("run.py").is_file() else "llama-jax"
    hint = f"{program} --checkpoint={shlex.quote(str(args.dst))} --prompt='Hello'"
    print(
        f"wrote {count:,} parameters, {dtype}, {tqdm.format_sizeof(size, 'B')}, to {args.dst}"
        + (f"; try: {hint}" if takes_text else "")
    )
    if rounding:
        changes = ", ".join(f"{rounding[what]:,} {what}" for what in source.ROUNDING)
        print(f"in {dtype}, of {count:,} values: {changes}; by tensor in manifest.json")


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
    check_destination(args.out)
    values, _ = open_checkpoint(args.dst)
    check_room(args.out, sum(file["bytes"] for file in values["files"].values()))
    size = export_hf(args.dst, args.out, progress=True)
    print(f"wrote {tqdm.format_sizeof(size, 'B')} to {args.out}, for transformers to load")
