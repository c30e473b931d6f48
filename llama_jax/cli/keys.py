"""The keys that the flags name."""

from llama_jax.cli.files import read_bytes
from llama_jax.cli.flags import FLAGS
from llama_jax.receipt.keys import PublicKey, Signer


def read_signer() -> Signer | None:
    """Read the private key that --sign_key names; None: it is not given."""
    if FLAGS.sign_key is None:
        return None
    name = f"--sign_key={FLAGS.sign_key}"
    return Signer(read_bytes(FLAGS.sign_key, name), name)


def read_public_key() -> PublicKey | None:
    """Read the public key that --key names; None: it is not given."""
    if FLAGS.key is None:
        return None
    name = f"--key={FLAGS.key}"
    return PublicKey(read_bytes(FLAGS.key, name), name)
