"""Receipts: what a run was asked, where it ran and all that it drew; see docs/receipts.md."""

from llama_jax.provenance.statement import make_statement
from llama_jax.receipt.keys import PublicKey, Signer
from llama_jax.receipt.reading import Receipt, read_receipts, read_statement

__all__ = [
    "PublicKey",
    "Receipt",
    "Signer",
    "make_statement",
    "read_receipts",
    "read_statement",
]
