"""Auth: whether a request carries the token, in one of the ways Cloudflare's clients send it."""

import hmac

from starlette.datastructures import Headers

from llama_jax.server.errors import BAD_HEADER, NO_TOKEN, WRONG_TOKEN, ApiError

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
