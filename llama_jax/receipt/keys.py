"""Keys: Ed25519 keys in PEM files, which sign receipts and verify them.

They need the extra `receipts`; nothing else of receipts does. securesystemslib documents names of
`securesystemslib.signer` that are not in its `__all__`: hence `pyright: ignore`.
"""

import importlib.util
import json
from typing import Any, Literal, NamedTuple

from llama_jax.errors import InputError
from llama_jax.receipt.envelope import PAYLOAD_TYPE, Envelope

_MAKE = "make one by `openssl genpkey -algorithm ed25519 -out FILE`"
_PUBLISH = "write its public part by `openssl pkey -in KEY -pubout -out FILE`"


class Signer:
    """A private key; called with a statement it returns the statement's envelope.

    Args:
        pem: a PKCS #8 file's content, as `openssl genpkey -algorithm ed25519` writes it.
        source: what to call it in an error.

    Raises:
        InputError: it is no such key, or the extra `receipts` is not installed.
    """

    def __init__(self, pem: bytes, source: str):
        _require_extra()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from securesystemslib.signer import CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

        key = _read_private(pem, source)
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{source} is a key for {_kind(key)}, expected Ed25519; {_MAKE}")
        self._signer = CryptoSigner(key)
        self.key_id = self._signer.public_key.keyid
        """See `PublicKey`."""

    def __call__(self, statement: dict[str, Any]) -> dict[str, Any]:
        """Return a statement in a DSSE envelope that it signs, as JSON."""
        from securesystemslib.dsse import Envelope as Dsse

        payload = json.dumps(statement, ensure_ascii=False).encode()
        envelope = Dsse(payload, PAYLOAD_TYPE, {})
        envelope.sign(self._signer)
        return envelope.to_dict()


class Fault(NamedTuple):
    """Why a receipt is not one that a key signed."""

    name: Literal["NOT_SIGNED", "ANOTHER_KEY", "CHANGED"]
    text: str


class PublicKey:
    """A public key, by which receipts are verified.

    Args:
        pem: a SubjectPublicKeyInfo file's content, as `openssl pkey -pubout` writes it.
        source: what to call it in an error.

    Raises:
        InputError: see `Signer`.
    """

    def __init__(self, pem: bytes, source: str):
        _require_extra()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from securesystemslib.signer import SSlibKey  # pyright: ignore[reportPrivateImportUsage]

        key = _read_public(pem, source)
        if not isinstance(key, Ed25519PublicKey):
            raise InputError(
                f"{source} is a key for {_kind(key)}, expected Ed25519, which receipts are signed "
                "by; name the signer's public key"
            )
        self._key = SSlibKey.from_crypto(key)
        self.key_id = self._key.keyid
        """securesystemslib's: the SHA-256 of the key as canonical JSON."""

    def fault(self, envelope: Envelope | None) -> Fault | None:
        """Return why this key has not signed a receipt; None: it has.

        A key id is a hint that anyone can write: it decides what is said, never what is accepted.

        Args:
            envelope: None: the receipt has none.
        """
        if envelope is None or not envelope.signatures:
            return Fault("NOT_SIGNED", f"not signed, expected key {self.key_id}")
        if any(self._signed(envelope.payload, each.value) for each in envelope.signatures):
            return None
        if self.key_id in (ids := envelope.key_ids) or not any(ids):
            reason = "the payload or the signature was changed"
            return Fault("CHANGED", f"not what key {self.key_id} signed: {reason}")
        others = " and ".join(f"{each:.80}" for each in ids[:3] if each)
        return Fault("ANOTHER_KEY", f"signed by another key: {others}, expected {self.key_id}")

    def _signed(self, payload: bytes, signature: bytes) -> bool:
        """Return whether it has signed a payload, whatever key id is beside the signature."""
        from securesystemslib.dsse import Envelope as Dsse
        from securesystemslib.exceptions import UnverifiedSignatureError
        from securesystemslib.signer import Signature  # pyright: ignore[reportPrivateImportUsage]

        signed = Dsse(payload, PAYLOAD_TYPE, {}).pae()
        try:
            self._key.verify_signature(Signature(self.key_id, signature.hex()), signed)
        except UnverifiedSignatureError:
            return False
        return True


def _require_extra() -> None:
    for package in ("cryptography", "securesystemslib"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"signatures of receipts need {package}, which is not installed; pip install "
                "'llama_jax[receipts]'"
            )


def _read_private(pem: bytes, source: str) -> Any:
    """Return the private key in a PEM file, of any kind."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if b"PUBLIC KEY-----" in pem and b"PRIVATE KEY-----" not in pem:
        raise InputError(f"{source} is a public key, expected the private one, which signs")
    try:
        return load_pem_private_key(pem, password=None)
    except TypeError:
        raise InputError(
            f"{source} is encrypted, expected a key without a password; decrypt it by `openssl "
            "pkey -in KEY -out FILE`"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{source} is no private key in PEM (PKCS #8); {_MAKE}") from None


def _read_public(pem: bytes, source: str) -> Any:
    """Return the public key in a PEM file, of any kind."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY-----" in pem:
        raise InputError(f"{source} is a private key, expected the public one; {_PUBLISH}")
    try:
        return load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{source} is no public key in PEM; {_PUBLISH}") from None


def _kind(key: Any) -> str:
    """Return the algorithm of a key: `RSA` of an RSAPrivateKey."""
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
