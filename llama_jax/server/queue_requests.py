"""Workers AI's queue: requests that are sent together, and whose answers are polled for."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama_jax.card import contract
from llama_jax.errors import InputError
from llama_jax.server.batches.batch_store import ENDED, WORKERS_AI
from llama_jax.server.batches.batches import Batches
from llama_jax.server.compact_json import CompactJSONResponse, encode
from llama_jax.server.in_thread import in_thread
from llama_jax.server.types import QueuedResult, QueueResult

_COUNTS = ("prompt_tokens", "completion_tokens")


async def queue_requests(request: Request, batches: Batches) -> Response:
    """POST .../ai/run/{model}?queueRequest=true: queue requests, or poll by `request_id`."""
    body, model = await request.body(), request.path_params["model"]

    def whole() -> bytes:
        result = _answer(batches, body, model)
        return encode({"result": result, "success": True, "errors": [], "messages": []})

    return CompactJSONResponse(await in_thread(whole))


def _answer(batches: Batches, body: bytes, model: str) -> QueuedResult | QueueResult:
    payload = contract.parse_body(body)
    if not isinstance(payload, dict) or len(payload.keys() & {"requests", "request_id"}) != 1:
        raise InputError(
            "with queueRequest the body is an object with either `requests`, a list, or "
            f"`request_id`, expected one of them, got {payload!r:.60}"
        )
    if "request_id" in payload:
        return _poll(batches, payload["request_id"])
    requests, most = payload["requests"], batches.settings.max_requests
    if not isinstance(requests, list) or not 1 <= len(requests) <= most:
        got = f"{len(requests):,}" if isinstance(requests, list) else repr(requests)[:40]
        raise InputError(f"requests has {got}, expected a list of 1 to {most:,} requests")
    return _queued(batches.queue(requests, model))


def _poll(batches: Batches, request_id: Any) -> QueuedResult | QueueResult:
    row = batches.batches.get(str(request_id), WORKERS_AI)
    if row["status"] not in ENDED:
        return _queued(row)
    answers = batches.lines.answers(row["number"], True, False)
    read, written = (row[name] for name in _COUNTS)
    return {
        "responses": [json.loads(answer["text"]) for answer in answers],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }


def _queued(row: dict[str, Any]) -> QueuedResult:
    is_running = row["status"] != "validating" and row["completed"] + row["failed"] > 0
    status = "running" if is_running else "queued"
    return {"status": status, "request_id": row["id"], "model": row["model"]}
