"""Settings: how the server behaves; what the model does is `Llama`'s own."""

import dataclasses
import re

from llama_jax.card import schemas as card
from llama_jax.errors import InputError, one_line


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is told at its start."""

    model: str = card.MODEL
    """The name it answers to."""
    api_token: str | None = None
    """What clients have to send; None: anything goes."""
    local_only: bool = False
    """Answer only to names of this machine, and to no pages but its own and allowed ones. Without a
    token, any web page could else use the server of whoever looks at it."""
    max_body_bytes: int = 8 * 2**20
    timeout_s: float = 600.0
    """For a whole request, its time in the queue included."""
    drain_s: float = 30.0
    """What running requests are given to end when the server is told to stop."""
    allowed_origins: tuple[str, ...] = ()
    """Origins, as `https://example.com`, whose pages may call this server; `*` is any."""
    warm_up: bool = True
    """Compile all programs before the first request; else each at its first use."""

    def __post_init__(self) -> None:
        """Refuse what would silently open the server or keep it from answering."""
        problems = [
            f"allowed_origins has {origin!r:.80}, expected * or as https://example.com"
            for origin in self.allowed_origins
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin)
        ]
        if not self.model:
            problems.append("model is empty, expected the name to serve")
        if self.api_token is not None and not self.api_token.strip():
            problems.append("api_token is empty, expected a secret; leave it out for none")
        for name in ("max_body_bytes", "timeout_s", "drain_s"):
            value = getattr(self, name)
            if not value >= 0 or (name != "drain_s" and value == 0):
                problems.append(f"{name} is {value!r}, expected a positive number")
        if problems:
            raise InputError(one_line(problems))
