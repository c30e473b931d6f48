"""Draw: a token that was drawn, and what was measured of it."""

from typing import NamedTuple


class Draw(NamedTuple):
    """One token that was drawn, and how near another one was: float32 values, exactly.

    A margin is infinite where there is no other token, or the filter is off; see
    `sampling.Sampled` and `filters.CutMargins`.
    """

    token: int
    logprob: float
    """The natural logarithm of its probability under the model alone."""
    margin: float
    top_k_margin: float
    top_p_margin: float
    min_p_margin: float
