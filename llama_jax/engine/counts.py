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

    drafted: int = 0
    """Draft tokens that were verified."""
    accepted: int = 0
    """Of those, the ones that equal the token drawn."""
    passes: int = 0
    """Passes of the model over a request's last token, with its drafts, where there is speculation:
    a decode step is one."""
    pass_tokens: int = 0
    """Tokens drawn in them."""

    def count_passes(self, drafted: int, accepted: int, passes: int, tokens: int) -> None:
        """Count what one request drafted and drew in a turn."""
        self.drafted += drafted
        self.accepted += accepted
        self.passes += passes
        self.pass_tokens += tokens

    def count_end(self, reason: str) -> None:
        """Count a request that ended."""
        self.ended[reason] = self.ended.get(reason, 0) + 1
