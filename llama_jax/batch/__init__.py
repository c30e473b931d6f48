"""A file of requests and the file of their results."""

from llama_jax.batch.file import Batch

__all__ = ["Batch"]
