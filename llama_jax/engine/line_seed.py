"""line_seed: a function of the batch and the line, not of who answers it or when."""

import hashlib

_LARGEST = 9_999_999_999
"""The model card's: such a seed can be sent anywhere."""


def line_seed(batch: int, number: int, sha256: str) -> int:
    """Return the seed, 1 to 9,999,999,999, of a line that names none.

    Args:
        batch: the seed of the whole batch, from 0.
        number: of the line, from 1.
        sha256: of the line's bytes without the white space around it, in hexadecimal.
    """
    digest = hashlib.sha256(f"{batch} {number} {sha256}".encode("ascii")).digest()
    return 1 + int.from_bytes(digest, "big") % _LARGEST
