"""Sums in a stated order, written as elementwise additions: their bits are the same in any batch.

A compiler chooses the order of its own sums, by the batch and the backend.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def log_softmax(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Return the logarithms of the probabilities."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted - jnp.log(sum_by_halves(jnp.exp(shifted)))


def sum_by_halves(x: Float[Array, "B n"]) -> Float[Array, "B 1"]:
    """Add the second half of each row to the first, and so on; zeros fill up to a power of two."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, ((0, 0), (0, size - x.shape[-1])))
    while size > 1:
        size //= 2
        x = x[:, :size] + x[:, size:]
    return x


def sums_before(x: Float[Array, "B n"]) -> Float[Array, "B n"]:
    """Return the sum of what comes before each element, by shifts of 1, 2, 4 ...

    An element's bits do not depend on how many come after it.
    """
    size, shift = x.shape[-1], 1
    while shift < size:
        x = x + _shifted(x, shift)
        shift *= 2
    return _shifted(x, 1)


def _shifted(x: Float[Array, "B n"], by: int) -> Float[Array, "B n"]:
    """Move each row's elements to the right; zeros come in."""
    return jnp.pad(x, ((0, 0), (by, 0)))[:, : x.shape[-1]]
