"""The plot of a comparison."""

import pathlib
from collections.abc import Sequence

from llama_jax.errors import InputError
from llama_jax.replay.compare import Pair


def plot_pairs(pairs: Sequence[Pair], path: pathlib.Path) -> None:
    """Write two panels: how log-probabilities differ, and how long tokens agree.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--plot needs matplotlib, which is not installed; pip install matplotlib"
        ) from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    gaps = sorted(gap for pair in pairs for gap in pair.gaps)
    shares = [(i + 1) / len(gaps) for i in range(len(gaps))]
    left.plot([max(gap, 1e-9) for gap in gaps], shares)
    left.set(xscale="log", ylim=(0, 1.02), xlabel="log-probability gap (nats)")
    left.set(ylabel="share of draws up to it", title="How numbers differ")
    longest = max((len(pair.agree) for pair in pairs), default=0)
    ends = [pair.first_divergence for pair in pairs]
    together = [
        sum(end is None or end > at for end in ends) / len(ends) for at in range(longest + 1)
    ]
    right.step(range(longest + 1), together, where="post")
    right.set(ylim=(0, 1.02), xlabel="draw", ylabel="share of runs", title="Runs still the same")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot={path}: {error}; name another file") from None
