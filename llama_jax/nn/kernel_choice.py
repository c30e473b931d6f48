"""KernelChoice: which implementation computes each operation of the model."""

from typing import NamedTuple


class KernelChoice(NamedTuple):
    """Static; `plan.py` chooses."""

    projection: str = "plain"
    """A key of `projection.IMPLEMENTATIONS`."""
    attention: str = "blocks"
    """Of one query a sequence; a key of `attention.IMPLEMENTATIONS`."""
    norm: str = "plain"
    """A key of `ops.NORM_IMPLEMENTATIONS`."""
    prefill_attention: str | None = None
    """Of several queries; None: as `attention`."""
    decode_rows: int | None = None
    """Rows of every product where a sequence has one query: sequences are padded to a multiple of
    it and multiplied so many at a time, since the bits of a row may depend on the number of rows.
    None: as many as there are sequences."""
