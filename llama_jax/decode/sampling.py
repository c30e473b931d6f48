"""The sampling law, version 2: how logits and a seed become a token. Pure functions, all float32.

    token_t = argmax(filtered_logits_t + Gumbel(fold_in(key(seed), t)))

t is the token's index in the output. Nothing else enters: not the batch slot, the neighbours, the
chunk, streaming, or the resume point. The filters, in order: bias, repetition, frequency and
presence penalty, temperature, top-k, top-p, min-p. docs/sampler.md states the law in full, with
test vectors.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llama_jax.decode.filters import CutMargins, apply_filters
from llama_jax.decode.rounding import quotient, rounded

SAMPLER_VERSION = 2

AnyArray = Array | np.ndarray

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0. Some clients send 1e-08 where they mean greedy."""

TOP_LOGPROBS = 20
"""The most likely tokens whose log-probabilities are returned: the limit of OpenAI's interface."""

NO_TOKEN = -1
"""Where a slot that is done emits no token, and where a request has no stop token."""

NOT_FINITE = -2
"""In place of a token: a NaN or plus infinity among the row's logits, or no finite one allowed."""

DIRTY = -3
"""In place of no token: a draft has numbers that are not finite, in the cache too."""


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
    min_p: Float[AnyArray, "B"]
    """Least probability kept, relative to the likeliest token's; 0 is off, at most 1."""
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
    min_p: float = 0.0,
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
        min_p=np.array([min_p], np.float32),
        repetition_penalty=np.array([repetition_penalty], np.float32),
        frequency_penalty=np.array([frequency_penalty], np.float32),
        presence_penalty=np.array([presence_penalty], np.float32),
    )


def make_bias(
    vocab_size: int,
    logit_bias: Mapping[int, float | int] | None = None,
    allowed_tokens: Collection[int] | None = None,
) -> Float[np.ndarray, "V"]:
    """Return what is added to a row's logits.

    Args:
        vocab_size: V.
        logit_bias: added to some tokens' logits.
        allowed_tokens: the others get -inf, so they are never drawn; None: all.
    """
    bias = np.zeros(vocab_size, np.float32)
    for token, value in (logit_bias or {}).items():
        bias[token] = value
    if allowed_tokens is not None:
        banned = np.ones(vocab_size, bool)
        banned[list(allowed_tokens)] = False
        bias[banned] = -np.inf
    return bias


class Sampled(NamedTuple):
    """What the law draws, and how near it was to something else."""

    tokens: Int[Array, "B"]
    """Token ids; ties go to the lower id. NOT_FINITE where there is nothing to draw."""
    scores: Float[Array, "B V"]
    """What the token is the maximum of: filtered logits plus noise; of a greedy row its logits."""
    margin: Float[Array, "B"]
    """The best score less the second best; infinity where there is no second."""
    cuts: CutMargins


def sample(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    steps: Int[Array, "B"],
    bias: Float[Array, "B V"],
    in_prompt: Bool[Array, "B V"],
    output_counts: Int[Array, "B V"],
    *,
    noise: bool = True,
    filters: bool = True,
) -> Sampled:
    """Draw the next token of each row by the law.

    Args:
        logits: float32.
        params: one entry per row.
        steps: index t in the output of the token to draw.
        bias: as from `make_bias`.
        in_prompt: the tokens that occur in the row's prompt.
        output_counts: how often each token occurs in the row's output so far.
        noise: static; False: all rows are greedy.
        filters: static; False: no row that is drawn has top-k, top-p or min-p.
    """
    logits = apply_penalties(logits + bias, params, in_prompt, output_counts)
    greedy = params.temperature < GREEDY_BELOW
    temperature = jnp.where(greedy, jnp.ones_like(params.temperature), params.temperature)
    logits = quotient(logits, temperature[:, None])
    # Not by the maximum, in which XLA may lose a NaN.
    is_finite = jnp.all(logits < jnp.inf, axis=-1) & jnp.any(logits > -jnp.inf, axis=-1)
    scores = logits
    cuts = CutMargins(*[jnp.full(logits.shape[:1], jnp.inf, jnp.float32)] * 3)
    if filters:
        # Off where the row is greedy: one row that needs the whole order costs all of them.
        scores, cuts = apply_filters(
            logits,
            top_k=jnp.where(greedy, 0, params.top_k),
            top_p=jnp.where(greedy, 1.0, params.top_p),
            min_p=jnp.where(greedy, 0.0, params.min_p),
        )
    if noise:
        scores += jax.vmap(gumbel, in_axes=(0, 0, None))(params.seeds, steps, logits.shape[-1])
        scores = jnp.where(greedy[:, None], logits, scores)
    # The least index of the maximum: 6 times as fast as XLA's argmax on a CPU.
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]
    best = jnp.max(scores, axis=-1, keepdims=True)
    tokens = jnp.min(jnp.where(scores == best, ids, scores.shape[-1]), axis=-1)
    second = jnp.max(jnp.where(ids == tokens[:, None], -jnp.inf, scores), axis=-1)
    margin = best[:, 0] - second
    return Sampled(jnp.where(is_finite, tokens, NOT_FINITE), scores, margin, cuts)


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
    # The contract allows 0, and dividing by it means nothing. CPUs take what is below tiny for 0.
    off = repetition < jnp.finfo(jnp.float32).tiny
    repetition = jnp.where(off, jnp.ones_like(repetition), repetition)
    in_output = output_counts > 0
    penalised = jnp.where(logits > 0, quotient(logits, repetition), rounded(logits * repetition))
    logits = jnp.where(in_prompt | in_output, penalised, logits)
    counts = output_counts.astype(jnp.float32)
    logits = logits - rounded(counts * params.frequency_penalty[:, None])
    return jnp.where(in_output, logits - params.presence_penalty[:, None], logits)
