"""Command line: python -m convert meta SRC DST | hf SRC DST | verify DST | export-hf DST OUT."""

import argparse
import itertools
import logging
import math
import os
import pathlib
import shlex
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from tqdm import tqdm

from convert import huggingface, meta, published, source
from convert.export import export_hf
from llama_jax.errors import InputError
from llama_jax.weights.atomic_directory import check_absent, partial_folder
from llama_jax.weights.checkpoint import DTYPES, open_checkpoint, save_checkpoint, verify_checkpoint
from llama_jax.weights.manifest import file_sizes
from llama_jax.weights.shards import Tensor

_MAX_SEQ_LEN = 4096
_EXAMPLE = """\
example:
  python -m convert meta ~/llama/llama-2-7b-chat ~/llama-2-7b-chat-jax
  python -m convert hf ~/Llama-2-7b-chat-hf ~/llama-2-7b-chat-jax --dtype=bfloat16
  python -m convert verify ~/llama-2-7b-chat-jax
  python -m convert export-hf ~/llama-2-7b-chat-jax ~/exported
"""


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder without permission
        if args.debug:
            raise
        _tell(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        _tell("interrupted: nothing is left behind")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared = argparse.ArgumentParser(add_help=False, parents=[debug])
    shared.set_defaults(run=_convert)
    shared.add_argument("src", metavar="SRC", type=pathlib.Path, help="folder of the weights")
    shared.add_argument(
        "dst", metavar="DST", type=pathlib.Path, help="checkpoint to write; must not exist yet"
    )
    shared.add_argument(
        "--dtype",
        choices=("source", *DTYPES),
        default="source",
        help="dtype to store; default: source, what the weights have already",
    )
    shared.add_argument(
        "--saturate",
        action="store_true",
        help="store the dtype's largest value for what exceeds it, instead of refusing",
    )

    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert published Llama 2 weights into a checkpoint that run.py loads; "
        "verify one; export one.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "Meta's release: params.json, consolidated.*.pth and tokenizer.model in one folder"
    from_meta = commands.add_parser("meta", parents=[shared], help=text, description=text)
    from_meta.add_argument(
        "--max_seq_len",
        type=_positive,
        metavar="N",
        help="context the model was trained for, which Meta's files do not say "
        f"(default: {_MAX_SEQ_LEN}, Llama 2's)",
    )
    text = (
        "Hugging Face's: config.json, *.safetensors or pytorch_model*.bin, and tokenizer.model "
        "in one folder"
    )
    commands.add_parser("hf", parents=[shared], help=text, description=text)
    text = "read a whole checkpoint again and compare it with the digests of its manifest"
    verify = commands.add_parser("verify", parents=[debug], help=text, description=text)
    text = "write a checkpoint as a Hugging Face folder, comparing it with its digests on the way"
    export = commands.add_parser("export-hf", parents=[debug], help=text, description=text)
    for command, run in ((verify, _verify), (export, _export)):
        command.set_defaults(run=run)
        command.add_argument("dst", metavar="DST", type=pathlib.Path, help="checkpoint")
    export.add_argument(
        "out", metavar="OUT", type=pathlib.Path, help="folder to write; must not exist yet"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _convert(args: argparse.Namespace) -> None:
    _check_destination(args.dst)
    if args.command == "meta":
        max_seq_len = _MAX_SEQ_LEN if args.max_seq_len is None else args.max_seq_len
        opened = meta.open_source(args.src, max_seq_len)
        # Meta's download script keeps the models' one tokenizer above their folders.
        tokenizer_folders = [args.src, args.src.resolve().parent]
    else:
        opened = huggingface.open_source(args.src)
        tokenizer_folders = [args.src]
    source.check_tensors(opened)
    dtype = source.target_dtype(opened, args.dtype)
    tokenizer = source.find_tokenizer(opened, *tokenizer_folders)
    if args.command == "meta" and args.max_seq_len is None:
        _tell(f"assuming --max_seq_len={_MAX_SEQ_LEN}, Llama 2's: Meta's files do not say it")
    if tokenizer is None:
        _tell(f"warning: no tokenizer.model in {args.src}: the checkpoint will take token ids only")
    elif tokenizer.parent != args.src:
        _tell(f"tokenizer.model is taken from {tokenizer.parent}")
    for difference in published.differences(opened.config):
        _tell(f"warning: {difference}: right only if the weights were trained so")

    count = sum(math.prod(opened.headers[name].shape) for name in opened.names.values())
    total = count * jnp.dtype(dtype).itemsize
    _check_room(args.dst, total)
    _check_published(args.src, tokenizer)
    _tell(f"writing {args.dst}")
    rounding: Counter[str] = Counter()
    params = source.read_params(opened, dtype, saturate=args.saturate)
    save_checkpoint(
        args.dst,
        _with_progress(params, total, len(opened.names), rounding),
        opened.config,
        tokenizer=tokenizer,
        origin={"format": args.command, "folder": args.src.resolve().name},
    )

    hint = f"python run.py --checkpoint={shlex.quote(str(args.dst))} --prompt='Hello'"
    size = tqdm.format_sizeof(total, "B")
    print(
        f"wrote {count:,} parameters, {dtype}, {size}, to {args.dst}"
        + (f"; try: {hint}" if tokenizer else "")
    )
    if rounding:
        changes = ", ".join(f"{rounding[what]:,} {what}" for what in source.ROUNDING)
        print(f"in {dtype}, of {count:,} values: {changes}; by tensor in manifest.json")


def _verify(args: argparse.Namespace) -> None:
    root = verify_checkpoint(args.dst, progress=True)
    print(f"{args.dst} is what was written; root {root}")


def _export(args: argparse.Namespace) -> None:
    _check_destination(args.out)
    values, _ = open_checkpoint(args.dst)
    _check_room(args.out, sum(file["bytes"] for file in values["files"].values()))
    size = export_hf(args.dst, args.out, progress=True)
    print(f"wrote {tqdm.format_sizeof(size, 'B')} to {args.out}, for transformers to load")


def _check_destination(path: pathlib.Path) -> None:
    """Refuse, before the work rather than after it, a folder that cannot be made."""
    check_absent(path)
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be made: {parent} is no folder that you can write to")


def _check_room(path: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(_existing_parent(path)).free
    free += sum(file_sizes(partial_folder(path)).values())  # what a killed run left will go
    if free < size:
        raise InputError(
            f"{path} needs {size:,} bytes, but its disk has {free:,} left; make room, or name a "
            "folder on another disk"
        )


def _existing_parent(path: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_published(folder: pathlib.Path, tokenizer: pathlib.Path | None) -> None:
    """Compare Meta's files with Meta's checksums, where those are."""
    lists = [folder / "checklist.chk"]
    if tokenizer is not None:
        lists.append(tokenizer.parent / "tokenizer_checklist.chk")
    for path in lists:
        if path.exists():
            count = published.check_list(path, progress=True)
            _tell(f"{path.name}: {count} file{'s' * (count > 1)} as published")


def _with_progress(
    params: Iterable[Tensor], total: int, count: int, rounding: Counter[str]
) -> Iterator[Tensor]:
    """Pass tensors on, showing how far it is, and add up how their values changed."""
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        numbers = itertools.count(1)  # enumerate would hold on to the tensor
        for tensor in params:
            bar.set_postfix_str(f"{next(numbers)}/{count} {tensor.path}", refresh=False)
            rounding.update(tensor.notes.get("rounding", {}))
            size = tensor.array.nbytes
            yield tensor
            del tensor  # before the next is read
            bar.update(size)


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    if "--debug" not in sys.argv:
        # Orbax logs and its threads print, in pages, the error that it also raises here.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        threading.excepthook = sys.unraisablehook = lambda args: None
    # Nothing is computed here: a GPU would only have its memory reserved away from others.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
