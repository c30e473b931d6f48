"""Command line: `python -m convert meta SRC DST`, `python -m convert hf SRC DST`."""

import argparse
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert import huggingface, meta, source
from llama_jax.checkpoint import DTYPES, check_absent, save_checkpoint
from llama_jax.errors import InputError

_MAX_SEQ_LEN = 4096
_EXAMPLE = """\
example:
  python -m convert meta ~/llama/llama-2-7b-chat ~/llama-2-7b-chat-jax
  python -m convert hf ~/Llama-2-7b-chat-hf ~/llama-2-7b-chat-jax --dtype=bfloat16
"""


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        _convert(args)
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
    shared = argparse.ArgumentParser(add_help=False)
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
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert published Llama 2 weights into a checkpoint that run.py loads.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    text = "Meta's release: params.json, consolidated.*.pth and tokenizer.model in one folder"
    from_meta = formats.add_parser("meta", parents=[shared], help=text, description=text)
    from_meta.add_argument(
        "--max_seq_len",
        type=_positive,
        metavar="N",
        help="context the model was trained for, which Meta's files do not say "
        f"(default: {_MAX_SEQ_LEN}, Llama 2's)",
    )
    text = "Hugging Face's: config.json, *.safetensors and tokenizer.model in one folder"
    formats.add_parser("hf", parents=[shared], help=text, description=text)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _convert(args: argparse.Namespace) -> None:
    _check_destination(args.dst)
    if args.format == "meta":
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
    if args.format == "meta" and args.max_seq_len is None:
        _tell(f"assuming --max_seq_len={_MAX_SEQ_LEN}, Llama 2's: Meta's files do not say it")
    if tokenizer is None:
        _tell(f"warning: no tokenizer.model in {args.src}: the checkpoint will take token ids only")
    elif tokenizer.parent != args.src:
        _tell(f"tokenizer.model is taken from {tokenizer.parent}")

    sizes = [math.prod(opened.headers[name].shape) for name in opened.names.values()]
    total = sum(sizes) * jnp.dtype(dtype).itemsize
    params = source.nest(_with_progress(source.read_params(opened, dtype), total))
    _tell(f"writing {args.dst}")
    origin = {"format": args.format, "folder": args.src.resolve().name}
    save_checkpoint(args.dst, params, opened.config, tokenizer=tokenizer, origin=origin)

    size = tqdm.format_sizeof(total, "B")
    hint = f"python run.py --checkpoint={shlex.quote(str(args.dst))} --prompt='Hello'"
    print(
        f"wrote {sum(sizes):,} parameters, {dtype}, {size}, to {args.dst}"
        + (f"; try: {hint}" if tokenizer else "")
    )


def _check_destination(path: pathlib.Path) -> None:
    """Refuse, before the work rather than after it, a folder that cannot be made."""
    check_absent(path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be made: {parent} is no folder that you can write to")


def _with_progress(
    params: Iterable[tuple[str, np.ndarray]], total: int
) -> Iterator[tuple[str, np.ndarray]]:
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        for path, array in params:
            bar.set_postfix_str(path, refresh=False)
            bar.update(array.nbytes)
            yield path, array


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    # Nothing is computed here: a GPU would only have its memory reserved away from others.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
