"""The file of receipts that the flags name."""

import contextlib
from contextlib import AbstractContextManager

from llama_jax.cli.files import expand
from llama_jax.cli.flags import FLAGS
from llama_jax.errors import InputError
from llama_jax.receipt.file import ReceiptFile


def open_receipts() -> AbstractContextManager[ReceiptFile | None]:
    """Open the file that --receipt names; None: it is not given."""
    if FLAGS.receipt is None:
        if FLAGS.private:
            raise InputError("--private is given without --receipt; add it")
        return contextlib.nullcontext()
    path = expand(FLAGS.receipt, f"--receipt={FLAGS.receipt}")
    return ReceiptFile(path, private=FLAGS.private)
