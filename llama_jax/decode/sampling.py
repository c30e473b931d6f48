"""The sampling law, version 1: how logits and a seed become a token. Pure functions, all float32.

    token_t = argmax(filtered_logits_t + Gumbel(fold_in(key(seed), t)))

t is the token's index in the output. Nothing else enters: not the batch slot, the neighbours, the
chunk, streaming, or the resume point. The filters, in order: repetition, frequency and presence
penalty, temperature, top-k, top-p. docs/sampler.md states the law in full, with test vectors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

SAMPLER_VERSION = 1

AnyArray = Array | np.ndarray

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0. Some clients send 1e-08 where they mean greedy."""

HEAD = 1024
"""Tokens to look through for a cut before all of the vocabulary is sorted."""


TOP_LOGPROBS = 20
"""The most likely tokens whose log-probabilities are returned: the limit of OpenAI's interface."""

NO_TOKEN = -1
"""Where a slot that is done emits no token, and where a request has no stop token."""


class SamplingParams(NamedTuple):
    """How each row is sampled: arrays, so that a change of values never recompiles."""

    seeds: UInt32[AnyArray, "B 2"]
    """64-bit seeds as words, high word first; see `seed_words`."""
    temperature: Float[AnyArray, "B"]
    """0 (argmax) to 5."""
    top_k: Int[AnyArray, "B"]
    """Tokens kept; 0 is off."""
    top_p: Float[AnyArray, "B"]
    """Probability kept; 1 and above is off, 0 keeps one token."""
    repetition_penalty: Float[AnyArray, "B"]
    """Over prompt and output; 1 is off, and so is 0."""
    frequency_penalty: Float[AnyArray, "B"]
    """Per occurrence in the output; 0 is off."""
    presence_penalty: Float[AnyArray, "B"]
    """Once for a token that occurs in the output; 0 is off."""


def seed_words(seed: int) -> np.ndarray:
    """Split a seed in [0, 2**64) into [high, low] uint32 words: the data of its threefry key.

    Without 64-bit types `jax.random.key` drops the high word: seeds 2**32 apart would collide.
    """
    return np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32)


def make_params(
    seed: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> SamplingParams:
    """Return the parameters of one row (NumPy arrays of shape [1, ...]) from validated numbers."""
    return SamplingParams(
        seeds=seed_words(seed)[None],
        temperature=np.array([temperature], np.float32),
        top_k=np.array([top_k or 0], np.int32),
        top_p=np.array([1.0 if top_p is None else top_p], np.float32),
        repetition_penalty=np.array([repetition_penalty], np.float32),
        frequency_penalty=np.array([frequency_penalty], np.float32),
        presence_penalty=np.array([presence_penalty], np.float32),
    )


def sample(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    steps: Int[Array, "B"],
    in_prompt: Bool[Array, "B V"],
    output_counts: Int[Array, "B V"],
) -> Int[Array, "B"]:
    """Draw the next token of each row by the law.

    Args:
        logits: float32, finite.
        params: one entry per row.
        steps: index t in the output of the token to draw.
        in_prompt: the tokens that occur in the row's prompt.
        output_counts: how often each token occurs in the row's output so far.

    Returns:
        Token ids. Ties go to the lower id.
    """
    logits = apply_penalties(logits, params, in_prompt, output_counts)
    greedy = params.temperature < GREEDY_BELOW
    temperature = jnp.where(greedy, jnp.ones_like(params.temperature), params.temperature)
    filtered = apply_filters(logits / temperature[:, None], params)
    noise = jax.vmap(gumbel, in_axes=(0, 0, None))(params.seeds, steps, logits.shape[-1])
    scores = jnp.where(greedy[:, None], logits, filtered + noise)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def gumbel(seed: UInt32[AnyArray, "2"], step: Int[Array, ""], vocab_size: int) -> Float[Array, "V"]:
    """Return the noise of output index `step`: standard Gumbel, one value per token.

    Written out rather than taken from `jax.random.gumbel`, whose method and flags have changed
    between releases. Value i depends on seed, step and i alone (not on the vocabulary's size), and
    the uniforms are fine near 0, where the large values that win come from.
    """
    key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
    with jax.threefry_partitionable(True):
        bits = jax.random.bits(jax.random.fold_in(key, step), (vocab_size,), jnp.uint32)
    return -jnp.log(-jnp.log1p(-_open_unit(bits)))


def _open_unit(bits: UInt32[Array, "V"]) -> Float[Array, "V"]:
    """Map 32 random bits to (0, 1), never 0 or 1: (bits + 1/2) / 2**32."""
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    return jnp.minimum(uniform, jnp.float32(1.0 - 2.0**-24))


def apply_penalties(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    in_prompt: Bool[Array, "B V"],
    output_counts: Int[Array, "B V"],
) -> Float[Array, "B V"]:
    """Apply the repetition penalty (arXiv:1909.05858), then OpenAI's frequency and presence."""
    repetition = params.repetition_penalty[:, None]
    off = repetition == 0  # the contract allows 0, and dividing by it means nothing
    repetition = jnp.where(off, jnp.ones_like(repetition), repetition)
    repeated = in_prompt | (output_counts > 0)
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(repeated, penalised, logits)
    counts = output_counts.astype(jnp.float32)
    logits = logits - params.frequency_penalty[:, None] * counts
    return logits - params.presence_penalty[:, None] * (counts > 0).astype(jnp.float32)


def apply_filters(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Set to -inf what top-k, then top-p over what top-k left, cut; the best token always stays.

    The order of tokens is by falling logit, then by rising id. top-p cuts a token when the tokens
    before it already hold more than `top_p`: the one that crosses stays.
    """
    in_use = (params.top_k > 0) | (params.top_p < 1)
    # Ordering the vocabulary is the most expensive part of sampling; the default needs none.
    return lax.cond(jnp.any(in_use), _filter, lambda logits, _: logits, logits, params)


class _Cut(NamedTuple):
    """Where a row's order of tokens is cut: the last that stays."""

    logit: Float[Array, "B 1"]
    id: Int[Array, "B 1"]
    settled: Bool[Array, "B 1"]
    """The part of the order that was looked at holds the cut."""


def _filter(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    vocab_size = logits.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32)[None, :], logits.shape)
    # Of -0 and 0, which are equal, XLA's top-k would take 0 first.
    ordering = jnp.where(logits == 0, 0.0, logits)

    def cut_whole(head: _Cut) -> _Cut:
        falling, ids_in_order = lax.sort((-ordering, ids), dimension=-1, is_stable=True, num_keys=1)
        whole = _cut(-falling, ids_in_order, logits, params)
        # Row by row, so that none depends on whether its neighbours needed this.
        return _Cut(*(jnp.where(head.settled, *pair) for pair in zip(head, whole, strict=True)))

    cut = _cut(*lax.top_k(ordering, min(HEAD, vocab_size)), logits, params)
    if vocab_size > HEAD:
        cut = lax.cond(jnp.all(cut.settled), lambda head: head, cut_whole, cut)
    inside = (logits > cut.logit) | ((logits == cut.logit) & (ids <= cut.id))
    off = ((params.top_k == 0) | (params.top_k >= vocab_size)) & (params.top_p >= 1)
    return jnp.where(inside | off[:, None], logits, -jnp.inf)


def _cut(
    ordered: Float[Array, "B n"],
    ids: Int[Array, "B n"],
    logits: Float[Array, "B V"],
    params: SamplingParams,
) -> _Cut:
    """Look for the cut in the first n tokens of the order."""
    size, vocab_size = ordered.shape[-1], logits.shape[-1]
    top_k = jnp.where(params.top_k > 0, params.top_k, vocab_size)[:, None]
    top_p = params.top_p[:, None]
    in_top_k = jnp.arange(size, dtype=jnp.int32)[None, :] < top_k
    # Not ordered[:, :1]: of a slice of its top-k XLA would make a sort.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(in_top_k, jnp.exp(ordered - highest), 0.0)
    all_weights = jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)
    total = jnp.where(top_k < vocab_size, jnp.sum(weights, axis=-1, keepdims=True), all_weights)
    probabilities = weights / total
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = in_top_k & ((before <= top_p) | (top_p >= 1))
    kept = kept.at[:, 0].set(True)

    # What is kept is a prefix of the order: compare with its last token instead of scattering back.
    last = jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.int32) - 1
    # With top-k off the cut is here if what crosses top_p is; with both off there is none.
    crossed = (top_k >= vocab_size) & ((last < size - 1) | (top_p >= 1))
    return _Cut(
        logit=jnp.take_along_axis(ordered, last, axis=-1),
        id=jnp.take_along_axis(ids, last, axis=-1),
        settled=(top_k <= size) | crossed,
    )
