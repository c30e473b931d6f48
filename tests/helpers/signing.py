"""Keys for tests, and DSSE by its specification, without the package's code."""

import base64
import json
import pathlib

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from llama_jax.receipt.keys import PublicKey, Signer

PAYLOAD_TYPE = "application/vnd.in-toto+json"


class Pair:
    """A new key, its two files, and what the package makes of them."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.key = Ed25519PrivateKey.generate()
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.public.pem"
        self.private.write_bytes(private_pem(self.key))
        self.public.write_bytes(public_pem(self.key))
        self.signer = Signer(self.private.read_bytes(), "a test's key")
        self.verifier = PublicKey(self.public.read_bytes(), "a test's key")

    @property
    def key_id(self) -> str:
        return self.verifier.key_id

    def envelope(self, payload: bytes, *, signed_as: str = PAYLOAD_TYPE, **fields):
        """An envelope by the specification; `fields` are more of its signature's."""
        signature = base64.b64encode(self.key.sign(pae(signed_as, payload))).decode()
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": signature} | fields],
        }


def private_pem(key, password: bytes | None = None) -> bytes:
    """A key as `openssl genpkey` writes it."""
    encryption = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password)
    )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def public_pem(key) -> bytes:
    """Its public part, as `openssl pkey -pubout` writes it."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def pae(kind: str, payload: bytes) -> bytes:
    """What DSSE signs: github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md."""
    parts = [kind.encode(), payload]
    return b" ".join([b"DSSEv1", *(b"%d %s" % (len(part), part) for part in parts)])


def with_payload(envelope, edit):
    """An envelope whose payload was edited, under the old signature."""
    statement = json.loads(base64.b64decode(envelope["payload"]))
    edit(statement)
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    return envelope | {"payload": payload}
