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
    """Sequences of every product where each has one query, or a window: they are padded to a
    multiple of it and multiplied so many at a time, since the bits of a row may depend on the
    number of rows.
    None: as many as there are sequences."""
    windows: bool = False
    """Several queries of a sequence are a window of its decoding, not a chunk of its prompt. They
    are padded, multiplied and attended to as one query is: no bit depends on other sequences."""
    rope: str = "plain"
    """A key of `ops.ROPE_IMPLEMENTATIONS`."""

    def of_window(self) -> "KernelChoice":
        """Return what computes windows."""
        return self._replace(windows=True, prefill_attention=None)

    def is_decoding(self, length: int) -> bool:
        """Return whether so many queries of each sequence are decoded, not read as a prompt."""
        return self.windows or length == 1


NATIVE = KernelChoice("native", "native", "native", rope="native")
"""The CPU kernels."""
