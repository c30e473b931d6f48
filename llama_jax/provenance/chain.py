"""Chain: a digest for each draw, over it and all before, so that a beginning can be checked."""

import hashlib
import struct
from collections.abc import Iterable, Iterator

_DRAW = struct.Struct("<I5f")

Draw = tuple[int, float, float, float, float, float]
"""A token and its measures; see `engine.draw.Draw`."""


def links(start: str, draws: Iterable[Draw]) -> Iterator[str]:
    """Yield the link after each draw.

    A link is the SHA-256 of the link before, as bytes, and the draw: its token as uint32 and its
    measures as float32, little-endian.

    Args:
        start: the link before the first, in hexadecimal.
        draws: in order.
    """
    link = bytes.fromhex(start)
    for draw in draws:
        link = hashlib.sha256(link + _DRAW.pack(*draw)).digest()
        yield link.hex()


def last_link(start: str, draws: Iterable[Draw]) -> str:
    """Return the link after the last draw."""
    return [start, *links(start, draws)][-1]
