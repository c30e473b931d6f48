"""The playground page; its policy allows only its own script and style."""

import base64
import functools
import hashlib
import pathlib
import re
from html import escape

from starlette.responses import HTMLResponse

from llama_jax.card import schemas as card

_PATH = pathlib.Path(__file__).parent / "page" / "index.html"


def reply(model: str) -> HTMLResponse:
    """Return the page for a model."""
    html = _read().replace(
        f'data-model="{card.MODEL}"', f'data-model="{escape(model, quote=True)}"', 1
    )
    return HTMLResponse(
        html,
        headers={
            "content-security-policy": content_security_policy(html),
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        },
    )


@functools.cache
def _read() -> str:
    return _PATH.read_text(encoding="utf-8")


def content_security_policy(html: str) -> str:
    """Return the policy of a page: its inline scripts and styles by hash, fetch from this server.

    A model may write markup. Even if the page inserted it, it would not run.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_sources(html, 'script')}",
            f"style-src {_sources(html, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _sources(html: str, tag: str) -> str:
    """Return the hashes of the contents of all elements with a tag."""
    contents = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL | re.IGNORECASE)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"
