"""Envelope: a signed statement as JSON, in DSSE (https://github.com/secure-systems-lab/dsse)."""

import base64
import dataclasses
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.strict_json import parse_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Of an in-toto statement; it is signed with the payload."""

_URL_SAFE = str.maketrans("-_", "+/")


class Signature(NamedTuple):
    """One of an envelope."""

    key_id: str
    """What it says whose it is, which nothing proves; empty: it does not say."""
    value: bytes


@dataclasses.dataclass(frozen=True)
class Envelope:
    """A payload and its signatures; see `keys.PublicKey` for whether they are true."""

    payload: bytes
    signatures: tuple[Signature, ...]

    @property
    def key_ids(self) -> list[str]:
        """Whose the signatures say that they are."""
        return [each.key_id for each in self.signatures]

    def statement(self, source: str) -> Any:
        """Return the JSON in the payload.

        Raises:
            InputError: it is no JSON.
        """
        return parse_json(self.payload, f"{source}: the payload")


def parse_envelope(value: Any, source: str) -> Envelope | None:
    """Return the envelope in a JSON value; None: it is something else, such as a bare statement.

    Raises:
        InputError: it is an envelope, and malformed or of another type of payload.
    """
    if not isinstance(value, dict) or not {"payload", "signatures"} <= value.keys():
        return None
    payload = _from_base64(value["payload"], f"{source}: the envelope's payload")
    if (given := value.get("payloadType")) != PAYLOAD_TYPE:
        raise InputError(
            f"{source}: the envelope's payloadType is {given!r:.80}, expected {PAYLOAD_TYPE}; name "
            "a file of receipts"
        )
    rows = value["signatures"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{source}: the envelope's signatures are {rows!r:.40}, expected objects")
    signatures = []
    for row in rows:
        key_id = row.get("keyid") or ""
        if not isinstance(key_id, str):
            raise InputError(f"{source}: a signature's keyid is {key_id!r:.40}, expected a text")
        signatures.append(Signature(key_id, _from_base64(row.get("sig"), f"{source}: a signature")))
    return Envelope(payload, tuple(signatures))


def open_envelope(value: Any, source: str) -> Any:
    """Return the statement in an envelope, which is not verified, or the value if it is none.

    Raises:
        InputError: see `parse_envelope`, or the payload is no JSON.
    """
    envelope = parse_envelope(value, source)
    return value if envelope is None else envelope.statement(source)


def _from_base64(text: Any, name: str) -> bytes:
    """Decode either alphabet, as DSSE has it."""
    try:
        return base64.b64decode(text.translate(_URL_SAFE), validate=True)
    except (AttributeError, ValueError):
        raise InputError(f"{name} is not base64; write the receipt again") from None
