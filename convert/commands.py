"""What each command of `python -m convert` does."""

import argparse
import pathlib
import shlex

from tqdm import tqdm

from convert import adapter, comparison, conversion, hub, quantization, source, vocabulary
from convert.console import report
from convert.conversion import Conversion, check_destination, check_room
from convert.export import export_hf
from llama_jax.config import INT8_LABEL
from llama_jax.errors import InputError
from llama_jax.regular_file import read_regular
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


def quantize(args: argparse.Namespace) -> None:
    """Write a checkpoint of another's weights as int8, and say how far it is from that."""
    text = _text_to_compare(args)
    size = quantization.quantize(args.src, args.dst, progress=True)
    root = open_checkpoint(args.dst)[0]["root"]
    print(f"wrote {INT8_LABEL}, {tqdm.format_sizeof(size, 'B')}, to {args.dst}; root {root}")
    if text is None:
        return
    try:
        print(comparison.compare(args.src, args.dst, text))
    except InputError as error:  # what was written is whole
        report(f"warning: not compared with {args.src}: {error}")


def _text_to_compare(args: argparse.Namespace) -> str | None:
    """Return the text that --text names, or the sample; None: there is nothing to compare on."""
    tokenizer, _ = stored_tokenizer.load_tokenizer(args.src)
    if args.text == pathlib.Path("none") or (tokenizer is None and args.text is None):
        return None
    if tokenizer is None:
        raise InputError(
            f"--text is given, but checkpoint {args.src} has no tokenizer to read it; drop it, "
            "or add one: python -m convert tokenizer"
        )
    return comparison.SAMPLE if args.text is None else _read_text(args.text)


def _read_text(path: pathlib.Path) -> str:
    try:
        return read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--text={path}: {error.strerror}; name a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--text={path}: not UTF-8 (byte {error.start:,}); save it so") from None


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
