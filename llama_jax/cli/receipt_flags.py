"""The flags of receipts and replays, and what each means."""

from absl import flags


def define() -> None:
    """Define them in absl's global set."""
    flags.DEFINE_string(
        "receipt",
        None,
        "Write a receipt of the run to this file, by which `replay` proves it; in batch a line for "
        "each request.",
    )
    flags.DEFINE_integer(
        "receipts",
        0,
        "Keep the receipts of the last N answers, for GET /receipts/ID; 0 keeps none.",
    )
    flags.DEFINE_bool(
        "private",
        False,
        "Leave prompt and text out of receipts; their digests stay. With --receipt, or in serve.",
    )
    flags.DEFINE_string(
        "sign_key",
        None,
        "Sign receipts by this Ed25519 key (PEM), in DSSE envelopes. With --receipt, or in serve.",
    )
    flags.DEFINE_string(
        "key",
        None,
        "Accept only receipts that are signed by this public key (PEM). Default: none, signatures "
        "are not verified.",
    )
    flags.DEFINE_bool(
        "prefill",
        False,
        "Check all draws of a receipt in one pass over prompt and answer: as fast as reading.",
    )
    flags.DEFINE_string(
        "seeds", None, "Seeds to answer by: 0:64 is 0 to 63, 0:64:2 every second, 1,5,9 these."
    )
    flags.DEFINE_string(
        "resume",
        None,
        "Continue the run of this receipt from draw --at; --seed and --max_tokens may be others. "
        "With the same seed the tokens are the same.",
    )
    flags.DEFINE_integer(
        "at", None, "With --resume: the draw to begin with, from 0. Default: after the last."
    )
    flags.DEFINE_string(
        "plot", None, "Write a plot of the comparison to this file; needs matplotlib."
    )
