"""Cores: the share of each worker, so that together they use those that there are."""

import math
from collections.abc import Mapping, Sequence

_FREE = 0.5
"""Of a share that its worker does not request: Ray's other tasks would wait for ever for a core if
the workers had all."""


def share_of(nodes: Sequence[float], workers: int) -> int:
    """Return how many cores each worker may use, 1 or more.

    Args:
        nodes: the cores of each node.
        workers: each is on one node.
    """
    largest = max(map(math.floor, nodes), default=1)
    for share in range(largest, 1, -1):
        if sum(math.floor(cores / share) for cores in nodes) >= workers:
            return share
    return 1


def requested(nodes: Sequence[float], workers: int) -> float:
    """Return the cores that a worker requests from Ray: less than its share."""
    return min(share_of(nodes, workers) - _FREE, _FREE * sum(nodes) / workers)


def environment(cores: int) -> Mapping[str, str]:
    """Return the environment of a process that computes with so many cores.

    XLA reads both names when it makes its threads, and ignores OMP_NUM_THREADS, which Ray sets.
    """
    return {"PJRT_NPROC": str(cores), "NPROC": str(cores)}
