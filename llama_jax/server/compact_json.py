"""Compact JSON responses."""

import json
from typing import Any

from starlette.responses import Response


def encode(value: Any) -> bytes:
    """Return compact JSON in UTF-8; a lone surrogate, which UTF-8 lacks, is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


class CompactJSONResponse(Response):
    """A JSON response without spaces."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the body; bytes are already JSON."""
        return content if isinstance(content, bytes) else encode(content)
