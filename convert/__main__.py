"""Command line: python -m convert meta | hf | quantize | tokenizer | verify | export-hf."""

import argparse
import contextlib
import pathlib
import sys
from typing import Any

import jax

from convert.commands import add_tokenizer, convert, export, quantize, verify
from convert.console import report
from convert.conversion import MAX_SEQ_LEN
from convert.quantization import WEIGHTS
from llama_jax.errors import InputError, printable
from llama_jax.version import __version__
from llama_jax.weights.dtypes import DTYPES
from llama_jax.weights.quiet import orbax_muted

_EXAMPLE = """\
example:
  python -m convert meta ~/llama/llama-2-7b-chat ~/llama-2-7b-chat-jax
  python -m convert hf ~/Llama-2-7b-chat-hf ~/llama-2-7b-chat-jax --dtype=bfloat16
  python -m convert hf meta-llama/Llama-2-7b-chat-hf ~/llama-2-7b-chat-jax
  python -m convert hf ~/Llama-2-7b-hf ~/tuned-jax --adapter=~/my-lora
  python -m convert quantize ~/llama-2-7b-chat-jax ~/llama-2-7b-chat-int8
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
        report(f"error: {printable(error)}")
        return 2
    except KeyboardInterrupt:
        report("interrupted: no part of a checkpoint is left behind")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert published Llama 2 weights into a checkpoint that run.py loads; "
        "quantize one; verify one; export one.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llama_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_conversions(commands, debug)
    _add_quantize(commands, debug)
    text = "add a tokenizer to a checkpoint that has none"
    tokenizer = commands.add_parser("tokenizer", parents=[debug], help=text, description=text)
    tokenizer.set_defaults(run=add_tokenizer)
    tokenizer.add_argument("dst", metavar="DST", type=_path, help="checkpoint")
    tokenizer.add_argument(
        "file", metavar="FILE", type=_path, help="tokenizer.model or tokenizer.json"
    )
    text = "read a whole checkpoint and compare it with the digests of its manifest"
    verify_ = commands.add_parser("verify", parents=[debug], help=text, description=text)
    text = "write a checkpoint as a Hugging Face folder; every tensor's digest is compared"
    export_ = commands.add_parser("export-hf", parents=[debug], help=text, description=text)
    for command, run in ((verify_, verify), (export_, export)):
        command.set_defaults(run=run)
        command.add_argument("dst", metavar="DST", type=_path, help="checkpoint")
    export_.add_argument(
        "out", metavar="OUT", type=_path, help="folder to write; must not exist yet"
    )
    return parser


def _add_conversions(commands: Any, debug: argparse.ArgumentParser) -> None:
    shared = _conversion_options(debug)
    text = "Meta's release: params.json, consolidated.*.pth and tokenizer.model in one folder"
    meta = commands.add_parser("meta", parents=[shared], help=text, description=text)
    meta.set_defaults(revision=None, adapter=None)
    text = (
        "Hugging Face's: config.json, *.safetensors or pytorch_model*.bin, and tokenizer.model "
        "or tokenizer.json, in one folder or a repository of the hub"
    )
    hf = commands.add_parser("hf", parents=[shared], help=text, description=text)
    hf.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of a repository of the hub; default: main",
    )
    hf.add_argument(
        "--adapter",
        metavar="ADAPTER",
        type=_source,
        help="LoRA adapter that PEFT saved, to merge into the weights in float32: a folder, or as "
        "SRC a repository of the hub",
    )


def _add_quantize(commands: Any, debug: argparse.ArgumentParser) -> None:
    text = (
        "write a checkpoint of another's weights whose projections are int8: half as large, faster "
        "to decode, and not the card's full precision; print how far it is from the other"
    )
    quantize_ = commands.add_parser("quantize", parents=[debug], help=text, description=text)
    quantize_.set_defaults(run=quantize)
    quantize_.add_argument("src", metavar="SRC", type=_path, help="checkpoint")
    quantize_.add_argument(
        "dst", metavar="DST", type=_path, help="checkpoint to write; must not exist yet"
    )
    quantize_.add_argument(
        "--weights", choices=WEIGHTS, default="int8", help="what projections become; default: int8"
    )
    quantize_.add_argument(
        "--text",
        metavar="FILE",
        type=_path,
        help="text to compare perplexity on, before and after; none: do not compare; default: a "
        "story of some 300 words",
    )


def _conversion_options(debug: argparse.ArgumentParser) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[debug])
    options.set_defaults(run=convert)
    options.add_argument(
        "src",
        metavar="SRC",
        type=_source,
        help="folder of the weights; for hf also ORG/NAME, hf://ORG/NAME or hf://ORG/NAME@REV, to "
        "download them from the Hugging Face hub",
    )
    options.add_argument(
        "dst", metavar="DST", type=_path, help="checkpoint to write; must not exist yet"
    )
    options.add_argument(
        "--dtype",
        choices=("source", *DTYPES),
        default="source",
        help="dtype to store; default: source, the dtype of the weights",
    )
    options.add_argument(
        "--saturate",
        action="store_true",
        help="store the dtype's largest value in place of larger ones, instead of refusing them",
    )
    options.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=_path,
        help="tokenizer.model or tokenizer.json; none: token ids only; default: SRC's",
    )
    options.add_argument(
        "--eos_tokens",
        metavar="ID,...",
        type=_ids,
        help="ids that end an answer; default: those of SRC's configs, else 2",
    )
    options.add_argument(
        "--max_seq_len",
        metavar="N",
        type=_positive,
        help="context length the model was trained for; default: that of SRC's config; Meta's "
        f"has none: {MAX_SEQ_LEN}, Llama 2's",
    )
    return options


def _source(text: str) -> str:
    """Return a path, or the name of a repository."""
    return text if text.startswith("hf://") else str(_path(text))


def _path(text: str) -> pathlib.Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a URL, expected a path on this machine; copy the files here first"
        )
    return pathlib.Path(text).expanduser()


def _ids(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not token ids such as 2,32000")
    return tuple(int(part) for part in parts)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    # Nothing is computed here: a GPU would only have its memory reserved away from others.
    jax.config.update("jax_platforms", "cpu")
    with contextlib.nullcontext() if "--debug" in sys.argv else orbax_muted():
        sys.exit(main())
