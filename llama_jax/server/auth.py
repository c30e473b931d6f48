"""Auth: whether a request may be answered: its token, in one of the ways Cloudflare's clients send
it, and the name that it calls this machine by."""

import hmac
import ipaddress
import urllib.parse
from collections.abc import Collection

from starlette.datastructures import Headers

from llama_jax.server.errors import (
    BAD_HEADER,
    NO_TOKEN,
    WRONG_HOST,
    WRONG_ORIGIN,
    WRONG_TOKEN,
    ApiError,
)

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
"""What anybody may read: they tell nothing that is not in this repository."""


def check_token(headers: Headers, token: str | None) -> None:
    """Let a request pass that carries the token, or if there is none.

    Raises:
        ApiError: no token was sent, or none that can be read, or another one.
    """
    if token is None:
        return
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, sent = authorization.partition(" ")
        if scheme.lower() != "bearer" or not sent.strip():
            raise ApiError(BAD_HEADER)
    elif "x-auth-key" in headers and "x-auth-email" in headers:
        sent = headers["x-auth-key"]
    else:
        raise ApiError(NO_TOKEN)
    # In constant time, so that a wrong one does not tell how much of it is right. Headers come
    # decoded as Latin-1; whoever set a token in another script sent it as UTF-8.
    if not hmac.compare_digest(sent.strip().encode("latin-1"), token.strip().encode("utf-8")):
        raise ApiError(WRONG_TOKEN)


def check_page(headers: Headers, allowed_origins: Collection[str]) -> None:
    """Let a request pass that no page sent, or one of this server's own or of an allowed origin.

    A browser says where it took a page from (Origin), and by what name it calls this machine
    (Host); no page can change either. A name that is not this machine's own may have been made to
    point here (DNS rebinding).

    Raises:
        ApiError: it gives another host's name, or comes from another page.
    """
    host, origin = headers.get("host", "localhost"), headers.get("origin")
    if not _is_local(host):
        raise ApiError(WRONG_HOST, host)
    if origin is None or "*" in allowed_origins or origin in allowed_origins:
        return
    if origin.partition("://")[2] != host:
        raise ApiError(WRONG_ORIGIN, origin)


def _is_local(host: str) -> bool:
    """Whether a Host header, with or without a port, can be no other machine's name."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
