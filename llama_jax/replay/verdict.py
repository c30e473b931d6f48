"""Verdict: what a replay found, for a person and as an in-toto Simple Verification Result."""

import dataclasses
import enum
import time
from typing import Any

from llama_jax.provenance.statement import STATEMENT_TYPE, time_text
from llama_jax.receipt.reading import Receipt
from llama_jax.version import __version__

SVR_TYPE = "https://in-toto.io/attestation/svr/v0.1"
VERIFIER = f"urn:llama-jax:docs/receipts.md:replay:{__version__}"


class Outcome(enum.Enum):
    """How a replay ended; the value is the command line's exit status for it."""

    EXACT = 0, "the same tokens, and every number in bits"
    TOKENS = 0, "the same tokens; numbers within what such machines differ by"
    DIVERGED = 1, "not the same"
    NOT_REPLAYABLE = 2, "cannot be run here"

    @property
    def status(self) -> int:
        """The exit status."""
        return self.value[0]


class Judgement(enum.StrEnum):
    """Why a replay diverged, by the evidence."""

    EDITED = "edited: the receipt is not what a run wrote"
    ANOTHER_MODEL = "another model: the weights, or how they are computed, are not those named"
    ANOTHER_SAMPLER = "another sampler: the logits are the same, and other tokens follow from them"
    TIE = "tie: the two tokens are nearer than the numbers are equal on such machines"


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first draw that is not the same."""

    at: int
    """Its index in the output, from 0."""
    recorded: int
    replayed: int
    """The two tokens."""
    margin: float
    """By how much the replayed one is ahead here, in scores; infinite where a filter cuts the
    recorded one."""
    tolerance: float
    """How far two scores may be off here, in scores."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a replay of one receipt found."""

    receipt: Receipt
    outcome: Outcome
    judgement: Judgement | None = None
    """Of what diverged."""
    divergence: Divergence | None = None
    """None: no token differs, or nothing was run."""
    reasons: tuple[str, ...] = ()
    """What does not fit together, or what is missing here."""
    mean_deficit: float | None = None
    """Token-DiFR (arXiv:2511.20621): the mean of `Checked.deficit`, each at most MAX_DEFICIT; None:
    the draws were not checked one by one."""

    def __str__(self) -> str:
        name = f"{self.receipt.invocation}: {self.outcome.name}"
        parts = [f"{self.receipt.num_draws} draws"]
        if self.judgement is not None:
            parts.append(str(self.judgement))
        if (found := self.divergence) is not None:
            parts.append(
                f"draw {found.at}: recorded token {found.recorded}, here {found.replayed}, "
                f"margin {found.margin:.3g}, tolerance {found.tolerance:.3g}"
            )
        parts += self.reasons
        if self.mean_deficit is not None and self.judgement is not None:
            parts.append(f"Token-DiFR {self.mean_deficit:.3g}")
        return f"{name} | {' | '.join(parts)}"

    def to_statement(self) -> dict[str, Any]:
        """Return an in-toto Simple Verification Result v0.1 over the receipt's subjects.

        Its properties are empty where nothing was found to be the same. `llamaJax` has the rest.
        """
        found = self.divergence
        properties = []
        if self.outcome.status == 0:
            properties = [f"LLAMA_JAX_REPLAY_{self.outcome.name}"]
        return {
            "_type": STATEMENT_TYPE,
            "subject": [
                {"name": each["name"], "digest": each["digest"]}
                for each in self.receipt.statement["subject"]
            ],
            "predicateType": SVR_TYPE,
            "predicate": {
                "verifier": {"id": VERIFIER},
                "timeCreated": time_text(time.time()),
                "properties": properties,
                "llamaJax": {
                    "invocationId": self.receipt.invocation,
                    "outcome": self.outcome.name,
                    "judgement": None if self.judgement is None else self.judgement.name,
                    "divergence": found and {k: _json(v) for k, v in vars(found).items()},
                    "reasons": list(self.reasons),
                    "tokenDifr": self.mean_deficit,
                },
            },
        }


def _json(value: float) -> float | str:
    """Return a number as JSON has it: an infinite one as text."""
    return str(value) if value in (float("inf"), float("-inf")) else value
