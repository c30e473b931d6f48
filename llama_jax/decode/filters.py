"""Filters of the sampling law: top-k, top-p and min-p."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama_jax.decode.rounding import quotient
from llama_jax.decode.sums import sum_by_halves, sums_before

HEADS = 64, 1024
"""How many of the first tokens are looked through for a cut before the whole vocabulary is sorted.

The first holds every top-k that the card allows, and most cuts by top-p.
"""


class CutMargins(NamedTuple):
    """How far each filter is from another cut; infinity where it is off."""

    top_k: Float[Array, "B"]
    """The last logit that stays, less the next one."""
    top_p: Float[Array, "B"]
    """The least distance of a probability that is summed up from `top_p`."""
    min_p: Float[Array, "B"]
    """The least distance of a quotient of probabilities from `min_p`."""


class Filtered(NamedTuple):
    """Logits after the filters."""

    logits: Float[Array, "B V"]
    """-inf where a filter cuts."""
    margins: CutMargins


def apply_filters(
    logits: Float[Array, "B V"],
    *,
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    min_p: Float[Array, "B"],
) -> Filtered:
    """Cut by top-k, then top-p, then min-p; the best token always stays.

    The order of tokens is by falling logit, then by rising id. top-p cuts a token when the tokens
    before it already hold more than `top_p`: the one that crosses stays.

    Args:
        logits: after the temperature.
        top_k: tokens kept; 0 is off.
        top_p: probability kept; 1 and above is off.
        min_p: least probability kept, relative to the likeliest token's; 0 is off.
    """
    kept, cut = _apply_cut(logits, top_k, top_p)
    # By the quotient of two probabilities, which needs no sum.
    quotients = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    kept = jnp.where(quotients >= min_p[:, None], kept, -jnp.inf)
    # The likeliest stays whatever the logits are.
    distances = jnp.where(quotients < 1, jnp.abs(quotients - min_p[:, None]), jnp.inf)
    nearest = jnp.min(distances, axis=-1)
    min_p_margin = jnp.where(min_p > 0, nearest, jnp.inf)
    return Filtered(kept, CutMargins(cut.top_k_margin[:, 0], cut.top_p_margin[:, 0], min_p_margin))


class _Cut(NamedTuple):
    """Where a row's order of tokens is cut: the last that stays."""

    logit: Float[Array, "B 1"]
    id: Int[Array, "B 1"]
    settled: Bool[Array, "B 1"]
    """The part of the order that was looked at holds the cut."""
    top_k_margin: Float[Array, "B 1"]
    top_p_margin: Float[Array, "B 1"]
    """See `CutMargins`."""


def _apply_cut(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> tuple[Float[Array, "B V"], _Cut]:
    """Cut by top-k and top-p: both keep a first part of the order."""
    vocab_size = logits.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32)[None, :], logits.shape)
    # Of -0 and 0, which are equal, XLA's top-k would take 0 first.
    ordering = jnp.where(logits == 0, 0.0, logits)

    def id_of_all(place: Int[Array, "B 1"], logit: Float[Array, "B 1"]) -> Int[Array, "B 1"]:
        equal = logits == logit
        before = place - jnp.sum(logits > logit, axis=-1, keepdims=True, dtype=jnp.int32)
        found = equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) == before + 1)
        return jnp.max(jnp.where(found, ids, 0), axis=-1, keepdims=True)

    def cut_within(heads: Sequence[int]) -> _Cut:
        if not heads:
            # Without ids, which are looked for at the cut alone.
            return _cut(_falling(ordering), id_of_all, logits, top_k, top_p)
        ordered, first_ids = lax.top_k(ordering, heads[0])

        def id_of_head(place: Int[Array, "B 1"], _: Float[Array, "B 1"]) -> Int[Array, "B 1"]:
            return jnp.take_along_axis(first_ids, place, axis=-1)

        cut = _cut(ordered, id_of_head, logits, top_k, top_p)
        # Of a row that is settled the longer one gives the same cut: no sum depends on its length.
        return lax.cond(jnp.all(cut.settled), lambda: cut, lambda: cut_within(heads[1:]))

    cut = cut_within([size for size in HEADS if size < vocab_size])
    inside = _is_until(logits, cut.logit, cut.id)
    off = ((top_k == 0) | (top_k >= vocab_size)) & (top_p >= 1)
    return jnp.where(inside | off[:, None], logits, -jnp.inf), cut


def _cut(
    ordered: Float[Array, "B n"],
    id_at: Callable[[Int[Array, "B 1"], Float[Array, "B 1"]], Int[Array, "B 1"]],
    logits: Float[Array, "B V"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
) -> _Cut:
    """Look for the cut in the first n tokens of the order.

    Args:
        ordered: their logits.
        id_at: returns the id of the token at a place, given its logit.
        logits, top_k, top_p: see `apply_filters`.
    """
    size, vocab_size = ordered.shape[-1], logits.shape[-1]
    top_k, top_p = jnp.where(top_k > 0, top_k, vocab_size)[:, None], top_p[:, None]
    places = jnp.arange(size, dtype=jnp.int32)[None, :]

    def token_at(place: Int[Array, "B 1"]) -> tuple[Float[Array, "B 1"], Int[Array, "B 1"]]:
        logit = jnp.take_along_axis(ordered, place, axis=-1)
        return logit, id_at(place, logit)

    last = token_at(jnp.minimum(top_k, size) - 1)
    in_top_k = _is_until(logits, *last) | (top_k >= vocab_size)
    # Not ordered[:, :1]: of a slice of its top-k XLA would make a sort.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    total = sum_by_halves(jnp.where(in_top_k, jnp.exp(logits - highest), 0.0))
    probabilities = jnp.where(places < top_k, quotient(jnp.exp(ordered - highest), total), 0.0)
    sums = sums_before(probabilities)
    beyond = (sums > top_p) & (top_p < 1)
    first_beyond = jnp.min(jnp.where(beyond, places, size), axis=-1, keepdims=True)
    logit, token = token_at(jnp.minimum(first_beyond, top_k) - 1)
    # With top-k off the cut is here if what crosses top_p is; with both off there is none.
    crossed = (top_k >= vocab_size) & ((first_beyond < size) | (top_p >= 1))
    best_cut = jnp.max(jnp.where(in_top_k, -jnp.inf, logits), axis=-1, keepdims=True)
    # Sums rise: the nearest one is beside the cut. That of no token is 0 whatever the logits are.
    # What top-k cuts has none, so that no margin depends on how much of the order is looked at.
    is_summed = (places > 0) & (places < top_k)
    distances = jnp.where(is_summed, jnp.abs(sums - top_p), jnp.inf)
    nearest = jnp.min(distances, axis=-1, keepdims=True)
    return _Cut(
        logit,
        token,
        settled=(top_k <= size) | crossed,
        top_k_margin=jnp.where(best_cut > -jnp.inf, last[0] - best_cut, jnp.inf),
        top_p_margin=jnp.where(top_p < 1, nearest, jnp.inf),
    )


def _falling(x: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Sort each row, the largest first. By integers: a CPU sorts those several times as fast."""

    def turned(bits: Int[Array, "B V"]) -> Int[Array, "B V"]:
        # An integer in the order of the number whose bits they are, and back.
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    keys = ~turned(lax.bitcast_convert_type(x, jnp.int32))
    keys = lax.sort(keys, dimension=-1, is_stable=False)
    return lax.bitcast_convert_type(turned(~keys), jnp.float32)


def _is_until(
    logits: Float[Array, "B V"], logit: Float[Array, "B 1"], token: Int[Array, "B 1"]
) -> Bool[Array, "B V"]:
    """Return whether each token comes before a given one in the order, or is it."""
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    return (logits > logit) | ((logits == logit) & (ids <= token))
