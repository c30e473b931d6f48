"""Canonical forms: the digest of JSON by RFC 8785, and floats written exactly."""

import hashlib
from typing import Any

import numpy as np
import rfc8785


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON.

    Raises:
        rfc8785.CanonicalizationError: it has none: an integer beyond 2**53, a NaN.
    """
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_hex(value: float) -> str:
    """Write a float32 value exactly: `0x1.8p-3`, `inf`."""
    return value.hex()


def from_hex(text: str) -> float:
    """Read what `to_hex` wrote.

    Raises:
        ValueError: it is not that of a float32 value, or NaN.
    """
    value = float.fromhex(text)
    with np.errstate(over="ignore"):
        if float(np.float32(value)) != value:  # or NaN
            raise ValueError(f"{text!r:.40} is no float32 value")
    return value
