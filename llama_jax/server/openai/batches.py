"""OpenAI's routes of batches: create, get, list and cancel."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama_jax.card import contract
from llama_jax.errors import InputError
from llama_jax.server.batches.batch_store import OPENAI
from llama_jax.server.batches.batches import Batches
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.in_thread import in_thread
from llama_jax.server.openai.batch_types import BatchObject, BatchRequest
from llama_jax.server.openai.files import batches_of, checked, page, page_limit
from llama_jax.server.workers_ai import service_of

MAX_BATCHES_PAGE = 100

_TIMES = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)


async def create_batch(request: Request) -> Response:
    """POST .../batches: have the lines of a file answered."""
    batches, body = batches_of(request), await request.body()
    model = service_of(request).settings.models[0]
    row = await in_thread(_create, batches, body, model)
    batches.worker.wake()
    return CompactJSONResponse(describe(row))


async def get_batch(request: Request) -> Response:
    """GET .../batches/{id}: how far a batch is."""
    batches, batch_id = batches_of(request), request.path_params["batch_id"]
    return CompactJSONResponse(describe(await in_thread(batches.batches.get, batch_id)))


async def list_batches(request: Request) -> Response:
    """GET .../batches: a page of the batches, the latest first."""
    batches, query = batches_of(request), request.query_params
    limit = page_limit(query, 20, MAX_BATCHES_PAGE)
    rows, has_more = await in_thread(batches.batches.page, query.get("after"), limit)
    return CompactJSONResponse(page([*map(describe, rows)], has_more))


async def cancel_batch(request: Request) -> Response:
    """POST .../batches/{id}/cancel: stop a batch; what is answered is kept."""
    batches, batch_id = batches_of(request), request.path_params["batch_id"]
    row = await in_thread(batches.batches.cancel, batch_id)
    batches.worker.wake()
    return CompactJSONResponse(describe(row))


def _create(batches: Batches, body: bytes, model: str) -> dict[str, Any]:
    payload = contract.parse_body(body)
    if not isinstance(payload, dict):
        raise InputError(f"body is {payload!r:.40}, expected an object")
    request: BatchRequest = checked(BatchRequest, payload)
    file = batches.files.get(request.input_file_id)
    if file["purpose"] != "batch":
        raise InputError(f"the purpose of {file['id']} is {file['purpose']!r}, expected 'batch'")
    batches.files.check_room(0)
    expiry = request.output_expires_after
    return batches.batches.create(
        *(OPENAI, request.endpoint, model, file["id"]),
        seed=request.seed,
        metadata=request.metadata,
        output_expires_s=None if expiry is None else expiry.seconds,
    )


def describe(row: Mapping[str, Any]) -> BatchObject:
    """Return a batch as OpenAI's clients know it."""
    status = "finalizing" if row["status"] == "expiring" else row["status"]
    read, written = row["prompt_tokens"], row["completion_tokens"]
    described: Any = {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "model": row["model"],
        "errors": None if row["errors"] is None else json.loads(row["errors"]),
        "input_file_id": row["input_file_id"],
        "completion_window": "24h",
        "status": status,
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        **{name: row[name] for name in _TIMES},
        "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
        "usage": {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        },
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
        "seed": int(row["seed"]),
    }
    return described
