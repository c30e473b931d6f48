"""Access log: one line of JSON per request, without prompts, responses and tokens."""

import datetime
import json
import logging
from typing import Any

from llama_jax.server.request_log import RequestLog

LOGGER = logging.getLogger("llama_jax.access")


def write(log: RequestLog) -> None:
    """Log a request that has ended."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("%s", json.dumps(_line(log)))


def _line(log: RequestLog) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "request_id": log.id,
        "method": log.method,
        "path": log.path,
        "route": log.route,
        "status": log.status,
        "error_code": log.error and log.error.kind.code,
        "prompt_tokens": log.prompt_tokens,
        "completion_tokens": log.completion_tokens,
        "finish_reason": ",".join(sorted({r.finish_reason for r in log.results})) or None,
        "ttft_s": _rounded(log.first_text_s),
        "duration_s": _rounded(log.duration_s),
        "client_disconnected": log.disconnected,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
