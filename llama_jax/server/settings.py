"""Settings of the server; those of the model are `Llama`'s."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from llama_jax.card import schemas as card
from llama_jax.errors import InputError, one_line
from llama_jax.server.batches.settings import BatchSettings

MAX_ANSWERS = 256
"""That one call may ask for, however long the queue may get."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one server."""

    models: tuple[str, ...] = (card.MODEL,)
    """Names of the model served; all mean the same model."""
    api_token: str | None = None
    """Token that clients must send; None: no authentication."""
    local_only: bool = False
    """Accept only requests to a name of this machine, from the server's own page or an allowed
    origin. Otherwise, without a token, any web page could use the server of its visitor."""
    max_body_bytes: int = 8 * 2**20
    timeout_s: float = 600.0
    """Time limit of a whole request, its time in the queue included."""
    drain_s: float = 30.0
    """Time that requests in flight have to end when the server shuts down."""
    allowed_origins: tuple[str, ...] = ()
    """Origins such as `https://example.com` whose pages may use this server; `*`: any origin."""
    max_queue_per_client: int | None = None
    """Requests of one address that may wait for a slot; None: as many as the queue holds."""
    max_slots_per_client: int | None = None
    """Slots that one address may have while others are active; None: all but one."""
    keep_alive_s: float = 15.0
    """Silence in a stream after which a comment is sent, so that no proxy takes it for dead."""
    receipts: int = 0
    """Runs that are kept for `GET /receipts/{id}`: those of the last answers; 0: none."""
    private_receipts: bool = False
    """Leave prompt and text out of receipts; their digests stay."""
    signer: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Signs a receipt, as `receipt.Signer` does; None: they are not signed."""
    batches: BatchSettings | None = None
    """Of stored batches; None: there are none."""
    warm_up: bool = True
    """Compile before the first request what serves every one; otherwise each at its first use."""

    def __post_init__(self) -> None:
        """Refuse settings that would open the server silently or make it useless."""
        problems = [
            f"allowed_origins has {origin!r:.80}, expected * or an origin such as https://example.com"
            for origin in self.allowed_origins
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin)
        ]
        if not (self.models and all(name.strip() for name in self.models)):
            problems.append(f"models is {self.models!r:.80}, expected names of the model to serve")
        if self.api_token is not None and not self.api_token.strip():
            problems.append("api_token is empty, expected a secret; leave it out for no token")
        for name in ("max_body_bytes", "timeout_s", "keep_alive_s", "drain_s"):
            value = getattr(self, name)
            if not value >= 0 or (name != "drain_s" and value == 0):
                problems.append(f"{name} is {value!r}, expected a positive number")
        share = self.max_queue_per_client
        if share is not None and (type(share) is not int or share < 0):
            problems.append(f"max_queue_per_client is {share!r}, expected a whole number from 0")
        slots = self.max_slots_per_client
        if slots is not None and (type(slots) is not int or slots < 1):
            problems.append(f"max_slots_per_client is {slots!r}, expected a whole number from 1")
        if type(self.receipts) is not int or self.receipts < 0:
            problems.append(f"receipts is {self.receipts!r}, expected a whole number from 0")
        problems += [] if self.batches is None else self.batches.problems()
        if problems:
            raise InputError(one_line(problems))
