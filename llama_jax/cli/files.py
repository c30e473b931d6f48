"""Files and stdin that flags name: bytes, text, and the prompt in them."""

import pathlib
import sys

from llama_jax.cli.flags import FLAGS
from llama_jax.errors import InputError

MOST_BYTES = 2**26
"""Of a prompt, a request or a text to score: a device such as /dev/zero has no end."""


def expand(path: str, name: str) -> pathlib.Path:
    """Return a path with `~` expanded; `name` is what to call it in an error."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: no such user; name another file") from None


def read_bytes(source: str, name: str) -> bytes:
    """Read a file, or stdin for "-"."""
    try:
        # Bytes: text is UTF-8 whatever the terminal's encoding.
        if source == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with expand(source, name).open("rb") as file:  # a pipe too: `<(...)`
                data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: {reason}; name a file, or - for stdin") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} has more than {MOST_BYTES:,} bytes; shorten it")
    return data


def read_text(source: str, name: str) -> str:
    """Read text in UTF-8, without a byte order mark and with \\n at the end of each line."""
    data = read_bytes(source, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"byte {error.start:,} is 0x{data[error.start]:02x}"
        raise InputError(f"{name}: not UTF-8 ({fault}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_prompt() -> str | None:
    """Return what --prompt or --prompt_file gives; None: neither is given.

    The line break at the end of a file is not part of the prompt: editors and `echo` add it.
    """
    if FLAGS.prompt_file is not None and FLAGS.prompt is not None:
        raise InputError("--prompt and --prompt_file are given together, expected one; drop one")
    if FLAGS.prompt_file is not None:
        source, name = FLAGS.prompt_file, f"--prompt_file={FLAGS.prompt_file}"
    elif FLAGS.prompt == "-":
        source, name = "-", "--prompt=-"
    else:
        return FLAGS.prompt
    text = read_text(source, name).removesuffix("\n")
    if not text:
        raise InputError(f"{name} is empty, expected a prompt of at least 1 character")
    return text
