"""Judge: from draws that were checked one by one, why a replay is not the recorded run.

The recorded tokens are given, so each draw is a test of its own, and each cause has its own trace:

another model     log-probabilities part at nearly every token
another sampler   log-probabilities are the same, and margins are not, at more than one draw
edited            one draw does not fit, or a token contradicts its own margin, and what comes
                  before it is the same
tie               log-probabilities part by rounding only, and a margin is smaller than that
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.decode.sampling import GREEDY_BELOW
from llama_jax.engine.draw import Draw
from llama_jax.engine.environment import Environment
from llama_jax.engine.parameters import Parameters
from llama_jax.replay.check import Checked
from llama_jax.replay.verdict import Divergence, Judgement

DEVIATIONS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 8e-2}
"""The standard deviation of a logit from one environment to another, at most; measured."""

MAX_DEFICIT = 10.0
"""Of one draw, in a mean: some are infinite."""

_NEARLY_EVERY = 0.5
_SATURATED = -0.01
"""Log-probabilities above this hardly move, whatever the model is."""


class Tolerance(NamedTuple):
    """How far numbers may be off between two environments; all 0 where bits must be equal."""

    logit: float
    """A logit, or a log-probability, in nats."""
    score: float
    """A score or a margin: a logit divided by the temperature."""
    probability: float
    """A sum or quotient of probabilities."""


EXACT = Tolerance(0.0, 0.0, 0.0)


def tolerance(recorded: Environment, here: Environment, parameters: Parameters) -> Tolerance:
    """Return how far the numbers of two environments may be off.

    Four deviations: one normal number in 15,000 is further off.
    """
    if recorded.parts == here.parts and here.parts["invariance"] == "batch":
        return EXACT
    logit = 4 * DEVIATIONS[here.parts["dtype"]]
    temperature = parameters.temperature
    score = 2 * logit / (1.0 if temperature < GREEDY_BELOW else temperature)
    return Tolerance(logit, score, min(1.0, score))


def mean_deficit(checked: Sequence[Checked]) -> float:
    """Return Token-DiFR's statistic."""
    return sum(min(each.deficit, MAX_DEFICIT) for each in checked) / max(1, len(checked))


def first_divergence(
    draws: Sequence[Draw], checked: Sequence[Checked], allowed: Tolerance, *, index: int = 0
) -> Divergence | None:
    """Return the first draw whose token is not the one that the law draws here.

    Args:
        draws, checked, allowed: see `judge`.
        index: in the output, of the first of these draws.
    """
    for i, (recorded, here) in enumerate(zip(draws, checked, strict=True), start=index):
        if recorded.token != here.draw.token:
            tokens = recorded.token, here.draw.token
            return Divergence(i, *tokens, here.deficit, allowed.score)
    return None


def are_within(recorded: Sequence[Draw], here: Sequence[Draw], allowed: Tolerance) -> bool:
    """Return whether all numbers are as near as two such environments have them."""
    return all(_numbers_agree(*pair, allowed) for pair in zip(recorded, here, strict=True))


def judge(
    draws: Sequence[Draw], checked: Sequence[Checked], allowed: Tolerance
) -> Judgement | None:
    """Return why recorded draws are not what the law draws here; None: they can be.

    Args:
        draws: as recorded.
        checked: the same draws, checked here.
        allowed: how far numbers may be off.
    """
    pairs = list(zip(draws, checked, strict=True))
    if is_another_model(draws, checked, allowed):
        first = next(i for i, pair in enumerate(pairs) if not _agree(*pair, allowed))
        # Up to a token that was changed, all is the same; what follows has another beginning.
        return Judgement.EDITED if _is_changed(*pairs[first], allowed) else Judgement.ANOTHER_MODEL
    others = [pair for pair in pairs if pair[0].token != pair[1].draw.token]
    if others and all(_is_tie(*pair, allowed) for pair in others):
        return Judgement.TIE
    if others and _is_changed(*others[0], allowed):
        return Judgement.EDITED
    # A draw whose logits are the same, and not what was made of them.
    unlike = [
        pair
        for pair in pairs
        if _parts_by(pair[0].logprob, pair[1].draw.logprob) <= allowed.logit
        and not _margins_agree(pair[0], pair[1].draw, allowed)
    ]
    if len(unlike) > 1:
        return Judgement.ANOTHER_SAMPLER
    is_other = allowed == EXACT and any(a != b.draw for a, b in pairs)
    return Judgement.EDITED if others or unlike or is_other else None


def is_another_model(draws: Sequence[Draw], checked: Sequence[Checked], allowed: Tolerance) -> bool:
    """Return whether log-probabilities part at nearly every token that has any to lose."""
    pairs = [(a.logprob, b.draw.logprob) for a, b in zip(draws, checked, strict=True)]
    telling = [pair for pair in pairs if min(pair) < _SATURATED] or pairs
    # Half of what one may be off is what few are off by.
    far = [pair for pair in telling if _parts_by(*pair) > allowed.logit / 2]
    return bool(far) and len(far) >= _NEARLY_EVERY * len(telling)


def _agree(recorded: Draw, here: Checked, allowed: Tolerance) -> bool:
    return recorded.token == here.draw.token and _numbers_agree(recorded, here.draw, allowed)


def _numbers_agree(recorded: Draw, here: Draw, allowed: Tolerance) -> bool:
    is_near = _parts_by(recorded.logprob, here.logprob) <= allowed.logit
    return is_near and _margins_agree(recorded, here, allowed)


def _is_changed(recorded: Draw, here: Checked, allowed: Tolerance) -> bool:
    """Return whether a token was put in place of the drawn one: the margin is still that one's."""
    return (
        recorded.token != here.draw.token
        and not _is_tie(recorded, here, allowed)
        and _margins_agree(recorded, here.draw, allowed)
    )


def _is_tie(recorded: Draw, here: Checked, allowed: Tolerance) -> bool:
    """Return whether rounding decides which of two tokens is drawn."""
    is_near = here.deficit <= allowed.score and allowed != EXACT
    return is_near or _is_at_a_cut(recorded, here.draw, allowed)


def _is_at_a_cut(recorded: Draw, here: Draw, allowed: Tolerance) -> bool:
    """Return whether rounding decides which tokens a filter keeps."""
    return any(
        draw.top_k_margin < allowed.score
        or min(draw.top_p_margin, draw.min_p_margin) < allowed.probability
        for draw in (recorded, here)
    )


def _margins_agree(recorded: Draw, here: Draw, allowed: Tolerance) -> bool:
    def agree(name: str, most: float) -> bool:
        return _parts_by(getattr(recorded, name), getattr(here, name)) <= most

    # At a cut the second-best token may be kept on one side alone.
    return (
        (agree("margin", allowed.score) or _is_at_a_cut(recorded, here, allowed))
        and agree("top_k_margin", allowed.score)
        and agree("top_p_margin", allowed.probability)
        and agree("min_p_margin", allowed.probability)
    )


def _parts_by(a: float, b: float) -> float:
    """Return the distance of two numbers, 0 of two infinities."""
    return 0.0 if a == b else abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf
