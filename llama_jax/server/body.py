"""Body: a request's body, part by part."""

import asyncio

from starlette.types import Receive, Scope

from llama_jax.server import errors

SILENCE_S = 30.0
"""Without a byte of a body; more than a network's worst pause, less than a proxy's patience."""


class DisconnectedError(Exception):
    """The client closed the connection."""


async def read_part(scope: Scope, receive: Receive) -> tuple[bytes, bool]:
    """Return the next part of a body, and whether there are more.

    Raises:
        TimeoutError: nothing came for too long.
        DisconnectedError: the client closed the connection.
        ApiError: what came is no HTTP.
    """
    async with asyncio.timeout(SILENCE_S):
        message = await receive()
    if (broken := scope.get(errors.REFUSAL)) is not None:
        raise broken
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message.get("body", b""), message.get("more_body", False)
