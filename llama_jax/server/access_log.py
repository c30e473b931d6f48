"""Access log: one line per request, without prompts, responses and tokens.

Programs read it as JSON. A person at a terminal reads a short line, and none for probes.
"""

import datetime
import json
import logging
from typing import Any

from llama_jax.errors import printable
from llama_jax.server.request_log import RequestLog

LOGGER = logging.getLogger("llama_jax.access")

_PROBES = ("/health", "/healthz", "/readyz", "/metrics")


class Entry:
    """A request that has ended, as an argument of a log record; its text is JSON."""

    def __init__(self, log: RequestLog):
        self.log, self.time = log, datetime.datetime.now(datetime.UTC)

    def __str__(self) -> str:
        return json.dumps(self._fields())

    def short(self) -> str:
        """Return the line for a person."""
        log, at = self.log, self.time.astimezone()
        parts = [f"{at:%H:%M:%S} {log.status or '---'} {log.method} {printable(log.path)}"]
        if log.prompt_tokens or log.completion_tokens:
            parts.append(f"{log.prompt_tokens:,} + {log.completion_tokens:,} tokens")
        parts.append(f"{log.duration_s:.2f} s")
        if log.disconnected:
            parts.append("the client disconnected")
        if log.error is not None:
            parts.append(f"error {log.error.kind.code}")
        return "  ".join(parts)

    @property
    def is_probe(self) -> bool:
        """Whether it is one of those that monitors send all the time, answered as it should be."""
        return self.log.path in _PROBES and self.log.status == 200

    def _fields(self) -> dict[str, Any]:
        log = self.log
        return {
            "time": self.time.isoformat(timespec="milliseconds"),
            "request_id": log.id,
            "session_id": log.session_id,
            "session_affinity": log.session_affinity,
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


class ShortFormatter(logging.Formatter):
    """Formats requests for a person."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a request's short line."""
        return _entry(record).short()


def is_no_probe(record: logging.LogRecord) -> bool:
    """Return whether a person wants to see a record."""
    return not _entry(record).is_probe


def write(log: RequestLog) -> None:
    """Log a request that has ended."""
    LOGGER.info("%s", Entry(log))


def _entry(record: logging.LogRecord) -> Entry:
    assert isinstance(record.args, tuple), "`write` gives one"
    (entry,) = record.args
    assert isinstance(entry, Entry)
    return entry


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
