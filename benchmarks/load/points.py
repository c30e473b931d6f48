"""Points: how much load, in which way."""

import dataclasses
import re
from collections.abc import Sequence

from llama_jax.errors import InputError

PER_CLIENT = 16
"""Requests of a closed loop for each client: few clients take long."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A load to measure under."""

    kind: str
    """closed: each of some clients waits for its answer; shared: so, and prompts begin alike;
    open: requests come at a rate; share: at a share of what the server has got through."""
    amount: float
    """Clients, requests a second, or that share."""
    requests: int

    def rate(self, capacity: float | None) -> float | None:
        """Return the requests a second to send, of a server that gets through `capacity`.

        None: a closed loop, whose rate is the server's.
        """
        if self.kind == "share":
            return self.amount * (capacity or 1)
        return self.amount if self.kind == "open" else None

    def __str__(self) -> str:
        clients = f"{self.amount:g} client{'s' * (self.amount != 1)}"
        return {
            "closed": clients,
            "shared": f"{clients}, shared prefix",
            "open": f"{self.amount:g} requests/s",
            "share": f"{self.amount:.0%} of capacity",
        }[self.kind]


def make_points(
    clients: Sequence[int], rates: Sequence[str], requests: int, *, shared: bool
) -> list[Point]:
    """Return the points in the order of running: capacity is known before its shares are asked.

    Args:
        clients: of closed loops.
        rates: of open ones: `2.5` requests a second, `80%` of the capacity.
        requests: of a point at most.
        shared: one more at the most clients, whose prompts begin alike.

    Raises:
        InputError: a rate is neither.
    """
    points = [Point("closed", n, min(requests, PER_CLIENT * n)) for n in sorted(clients)]
    for text in rates:
        if not re.fullmatch(r"\d+(\.\d+)?%?", text) or float(text.rstrip("%")) == 0:
            raise InputError(f"--rate has {text!r}, expected requests a second, or as 80%")
        if text.endswith("%"):
            points.append(Point("share", float(text.rstrip("%")) / 100, requests))
        else:
            points.append(Point("open", float(text), requests))
    if shared:
        points.append(Point("shared", points[len(clients) - 1].amount, requests))
    return points
