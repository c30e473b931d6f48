"""Auth: the token, sent as Cloudflare's clients send it, and the host and origin of a request."""

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

OPEN_PATHS = frozenset({"/", "/health", "/healthz", "/readyz", "/openapi.json"})
"""Paths without authentication; they hold only what this repository holds."""


def check_token(headers: Headers, token: str | None) -> None:
    """Check the token of a request, if the server has one.

    Raises:
        ApiError: the token is missing, malformed or wrong.
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
    # In constant time, so that the time does not show how much of a wrong token is right. Headers
    # arrive decoded as Latin-1; clients send a token in another script as UTF-8.
    if not hmac.compare_digest(sent.strip().encode("latin-1"), token.strip().encode("utf-8")):
        raise ApiError(WRONG_TOKEN)


def check_page(headers: Headers, allowed_origins: Collection[str]) -> None:
    """Check that a request comes from no page, this server's own page or an allowed origin.

    A browser sends the page's origin (Origin) and the name of this machine that it used (Host). A
    page can change neither. A name that is not this machine's own may have been pointed here (DNS
    rebinding).

    Raises:
        ApiError: the request names another host or comes from another page.
    """
    host, origin = headers.get("host", "localhost"), headers.get("origin")
    if not _is_local(host):
        raise ApiError(WRONG_HOST, host)
    if origin is None or "*" in allowed_origins or origin in allowed_origins:
        return
    if origin.partition("://")[2] != host:
        raise ApiError(WRONG_ORIGIN, origin)


def _is_local(host: str) -> bool:
    """Whether a Host header, with or without a port, can only name this machine."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
