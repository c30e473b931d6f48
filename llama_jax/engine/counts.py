"""Counts: what an engine has done."""

import dataclasses


@dataclasses.dataclass
class Counts:
    """What the engine has done since it was made."""

    prompt_tokens: int = 0
    """Of all requests that got a slot."""
    cached_tokens: int = 0
    """Of those, served from the prefix cache."""
    tokens: int = 0
    """Generated."""
    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    """Requests by finish reason, or `error`."""

    def count_end(self, reason: str) -> None:
        """Count a request that ended."""
        self.ended[reason] = self.ended.get(reason, 0) + 1
