"""The verb verify_receipt: whether receipts are signed by a key, and not edited."""

import collections
import json
import sys

from llama_jax.cli.console import note
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.keys import read_public_key
from llama_jax.errors import InputError, printable
from llama_jax.receipt.check import check_receipts


def verify_receipt(path: str) -> None:
    """Print a line for each receipt of a file; the exit status is 1 if one is not valid.

    No model is loaded and no device of JAX is initialized.

    Args:
        path: as `read_receipts` takes it.
    """
    if FLAGS.output not in ("text", "json"):
        raise InputError(f"--output is {FLAGS.output!r:.40}, expected text or json")
    key = read_public_key()
    counts, invalid = collections.Counter[str](), 0
    for checked in check_receipts(path, key):
        as_json = FLAGS.output == "json"
        print(json.dumps(checked.to_dict()) if as_json else printable(checked), flush=True)
        counts[checked.finding.name] += 1
        invalid += not checked.is_valid
    note(", ".join(f"{count:,} {name}" for name, count in counts.most_common()))
    if key is None:
        note("warning: no signature was verified; give --key")
    if invalid:
        sys.exit(1)
