"""Compare: how far two sides agree, each a file of receipts or a model, over the same requests."""

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.receipt.reading import Receipt
from llama_jax.replay.check import check_draws
from llama_jax.replay.judge import MAX_DEFICIT


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two sides on one request."""

    agree: list[bool]
    """Of each draw compared, whether both sides draw the same token after the same beginning."""
    gaps: list[float]
    """By how much their log-probabilities of the first side's token differ, in nats."""
    deficits: list[float]
    """See `Checked.deficit`; empty if the second side is a file."""
    divergences: list[float]
    """KL divergence from the second side to the first at each draw, in nats; empty unless both
    are models."""

    @property
    def first_divergence(self) -> int | None:
        """The first draw that differs; None: none does."""
        return self.agree.index(False) if False in self.agree else None


def compare_receipts(first: Sequence[Receipt], second: Sequence[Receipt]) -> Iterator[Pair]:
    """Compare two files, receipt by receipt, each up to its first other token.

    Raises:
        InputError: they are not of the same requests, in the same order, or private.
    """
    if len(first) != len(second):
        raise InputError(
            f"got {len(first):,} and {len(second):,} receipts, expected as many of the same "
            "requests"
        )
    for a, b in zip(first, second, strict=True):
        _check_public(a, b)
        if (a.prompt_tokens, a.parameters) != (b.prompt_tokens, b.parameters):
            raise InputError(
                f"receipts {a.invocation} and {b.invocation} are of different requests, expected "
                "the same in the same order"
            )
        agree, gaps = [], []
        for mine, other in zip(a.draws, b.draws, strict=False):
            agree.append(mine.token == other.token)
            if not agree[-1]:  # what follows has another beginning
                break
            gaps.append(abs(mine.logprob - other.logprob))
        yield Pair(agree, gaps, [], [])


def compare_with_model(
    first: Iterable[Receipt], llm: Llama, logits: Iterable[np.ndarray | None]
) -> Iterator[Pair]:
    """Compare receipts with a model, which draws again after each recorded beginning.

    Args:
        first: the receipts; the model may be another than theirs.
        llm: the second side.
        logits: of the first side for each receipt, as from `logits_of`; None: not known.

    Raises:
        InputError: a receipt is private, or does not fit the model.
    """
    for receipt, known in zip(first, logits, strict=False):
        _check_public(receipt)
        check_fits(receipt, llm)
        checked = check_draws(llm, receipt.prompt_tokens, receipt.draws, receipt.parameters)
        pairs = list(zip(receipt.draws, checked, strict=True))[receipt.resumed :]
        divergences = [] if known is None else _divergences(known, logits_of(receipt, llm))
        yield Pair(
            agree=[mine.token == here.draw.token for mine, here in pairs],
            gaps=[abs(mine.logprob - here.draw.logprob) for mine, here in pairs],
            deficits=[min(here.deficit, MAX_DEFICIT) for _, here in pairs],
            divergences=divergences,
        )


def check_fits(receipt: Receipt, llm: Llama) -> None:
    """Refuse a receipt whose tokens a model does not have, or has no room for."""
    ids = [*receipt.prompt_tokens, *(draw.token for draw in receipt.draws)]
    if max(ids) >= llm.config.vocab_size or len(ids) > llm.context + 1:
        raise InputError(
            f"receipt {receipt.invocation} has {len(ids):,} tokens with ids up to {max(ids):,}, "
            f"the model holds {llm.context:,} of {llm.config.vocab_size:,}; compare models of one "
            "vocabulary"
        )


def logits_of(receipt: Receipt, llm: Llama) -> np.ndarray:
    """Return the float32 logits [draws, V] from which a receipt's tokens were drawn."""
    text = [*receipt.prompt_tokens, *(draw.token for draw in receipt.draws)][:-1]
    return llm.logits(text)[len(receipt.prompt_tokens) - 1 :]


def figures(pairs: Sequence[Pair]) -> dict[str, float | int | None]:
    """Return what is to be known of all pairs; None where nothing was compared."""
    agree = [each for pair in pairs for each in pair.agree]
    firsts = [pair.first_divergence for pair in pairs]
    found = [first for first in firsts if first is not None]

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    gaps = [gap for pair in pairs for gap in pair.gaps]
    return {
        "runs": len(pairs),
        "draws": len(agree),
        "token_agreement": mean([float(each) for each in agree]),
        "runs_without_divergence": len(firsts) - len(found),
        "first_divergence_median": statistics.median(found) if found else None,
        "logprob_gap_mean": mean(gaps),
        "logprob_gap_max": max(gaps, default=None),
        "token_difr": mean([d for pair in pairs for d in pair.deficits]),
        "kl_mean": mean([d for pair in pairs for d in pair.divergences]),
        "kl_max": max((d for pair in pairs for d in pair.divergences), default=None),
    }


def _divergences(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return KL(first || second) of each row's softmax, in float64."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    a, b = log_softmax(first), log_softmax(second)
    return (np.exp(a) * (a - b)).sum(axis=-1).clip(min=0).tolist()


def _check_public(*receipts: Receipt) -> None:
    for receipt in receipts:
        if receipt.is_private:
            raise InputError(f"receipt {receipt.invocation} is private: it has no tokens")
