"""Products and quotients that are rounded by themselves, whatever is computed with them.

XLA may turn a product and a sum into one fused multiply-add, and division by one number for each
row into multiplication by its reciprocal. Whether it does depends on the shapes and the backend.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rounded(product: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Return a product, which is not +inf, as it is; the bound keeps sums from being fused."""
    return jnp.minimum(product, jnp.finfo(jnp.float32).max)


def quotient(a: Float[Array, "B V"], b: Float[Array, "B #V"]) -> Float[Array, "B V"]:
    """Divide; behind the barrier XLA does not see that all of a row's divisors are equal."""
    return a / lax.optimization_barrier(jnp.broadcast_to(b, a.shape))
