"""Access log: one line of JSON for each request. What was asked and answered is not in it."""

import datetime
import json
import logging
from typing import Any

from llama_jax.server.request_log import RequestLog

LOGGER = logging.getLogger("llama_jax.access")


def write(call: RequestLog) -> None:
    """Log a call that is over."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("%s", json.dumps(_line(call)))


def _line(call: RequestLog) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "request_id": call.id,
        "method": call.method,
        "path": call.path,
        "route": call.route,
        "status": call.status,
        "error_code": call.error and call.error.kind.code,
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "finish_reason": ",".join(sorted({r.finish_reason for r in call.results})) or None,
        "ttft_s": _rounded(call.first_text_s),
        "duration_s": _rounded(call.duration_s),
        "client_disconnected": call.disconnected,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
