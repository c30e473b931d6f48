"""BodyBudget: a bound on the bytes of all requests' bodies together."""

import contextlib
from collections.abc import Iterator

from llama_jax.server import errors
from llama_jax.server.errors import ApiError

SMALL_BYTES = 64 * 2**10
"""A body up to this size always fits; a prompt of 4,096 tokens has some 16 KiB."""

LARGEST_BODIES = 4
"""Bodies of the largest size that fit together; while it is parsed, one takes up to 120 times its
bytes."""


class BodyBudget:
    """Counts the bytes of the bodies of all requests under way.

    Together they hold at most `limit` bytes, and SMALL_BYTES for each open connection.

    Args:
        max_body_bytes: the most bytes of one body.
    """

    def __init__(self, max_body_bytes: int):
        self.limit = LARGEST_BODIES * max_body_bytes
        self.held = 0
        """Bytes of all bodies now."""

    @contextlib.contextmanager
    def share(self) -> Iterator["BodyShare"]:
        """Open the share of one request, which ends with the context."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.release()


class BodyShare:
    """The bytes of one request's body.

    Args:
        budget: which they are a part of.
    """

    def __init__(self, budget: BodyBudget):
        self._budget, self._held = budget, 0

    def take(self, count: int) -> None:
        """Add bytes that have come.

        Raises:
            ApiError: there is no room for them.
        """
        budget = self._budget
        if self._held + count > SMALL_BYTES and budget.held + count > budget.limit:
            raise ApiError(
                *(errors.BODIES_FULL, "too many large requests are under way"),
                headers={"connection": "close"},
            )
        self._held += count
        budget.held += count

    def release(self) -> None:
        """Give all of them back."""
        self._budget.held -= self._held
        self._held = 0
