"""The native routes of Workers AI: run a model, search for models, read a model's schema."""

import contextlib
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.card import contract
from llama_jax.card import schemas as card
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Result
from llama_jax.errors import InputError
from llama_jax.provenance.statement import check_digest
from llama_jax.server.answers import Answers
from llama_jax.server.batches.refusals import NO_BATCHES
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.errors import NO_MODEL, ApiError
from llama_jax.server.in_thread import in_thread
from llama_jax.server.queue_requests import queue_requests
from llama_jax.server.receipts import ReceiptStore
from llama_jax.server.request_log import request_log_of
from llama_jax.server.service import Service
from llama_jax.server.sse import DONE, Events, EventStream, event
from llama_jax.server.types import Metadata, ModelEntry, Note, ResultInfo, RunResult

MAX_PAGE = 2**31
MAX_PER_PAGE = 100

_NOTE_CODE = 1000
_TASK = "Text Generation"


async def run(request: Request) -> Response:
    """POST .../ai/run/{model}: generate."""
    service, log = service_of(request), request_log_of(request.scope)
    check_model(service, request.path_params["model"])
    if _is_queued(request):
        if service.batches is None:
            raise ApiError(NO_BATCHES)
        return await queue_requests(request, service.batches)
    body = await request.body()
    parsed, generation = await in_thread(_parse, body)
    notes = [
        _note(f"{name} is not in this model's input schema: it was ignored")
        for name in parsed.ignored
    ]
    notes += map(_note, generation.warnings(service.llm.tokenizer))
    receipts = _receipts_asked(request)
    answers = await service.answer(log, [generation], streamed=parsed.stream)
    if parsed.stream:
        events = _events(answers, notes, receipts)
        return EventStream(log, answers, events, service.settings.keep_alive_s)
    [result] = await answers.results()
    metadata = await _metadata(result, receipts)
    whole: RunResult = {"response": result.response, "tool_calls": [], **metadata}
    return envelope(whole, notes)


async def search_models(request: Request) -> Response:
    """GET .../ai/models/search: the model by each of its names that match the query."""
    query = _SearchQuery(request.query_params)
    service = service_of(request)
    models = [_describe(service, name) for name in service.settings.models]
    found = [model for model in models if query.matches(model)]
    shown = found[(query.page - 1) * query.per_page :][: query.per_page]
    info: ResultInfo = {
        "count": len(shown),
        "page": query.page,
        "per_page": query.per_page,
        "total_count": len(found),
        "total_pages": -(-len(found) // query.per_page),
    }
    return envelope(shown, [], result_info=info)


async def read_schema(request: Request) -> Response:
    """GET .../ai/models/schema: the model card's two schemas, byte for byte."""
    if "model" not in request.query_params:
        raise InputError("model is missing, expected its name in the query: ?model=NAME")
    check_model(service_of(request), request.query_params["model"])
    schemas = b'{"input":' + card.INPUT_SCHEMA + b',"output":' + card.OUTPUT_SCHEMA + b"}"
    return CompactJSONResponse(
        b'{"result":' + schemas + b',"success":true,"errors":[],"messages":[]}'
    )


def service_of(request: Request) -> Service:
    """Return the service of the application."""
    return request.app.state.service


def check_model(service: Service, name: str) -> None:
    """Refuse a model that is not served."""
    if name not in service.settings.models:
        raise ApiError(NO_MODEL, name, param="model")


def envelope(result: Any, messages: list[Note], **more: Any) -> CompactJSONResponse:
    """Return a success in the envelope of Cloudflare's API."""
    return CompactJSONResponse(
        {"result": result, "success": True, "errors": [], "messages": messages, **more}
    )


def _parse(body: bytes) -> tuple[contract.CardRequest, GenerationRequest]:
    parsed = contract.check(contract.parse_body(body))
    return parsed, parsed.request()


def _is_queued(request: Request) -> bool:
    """Return whether requests are to be queued, or polled for.

    Raises:
        InputError: the query's queueRequest is neither true nor false.
    """
    queued = request.query_params.get("queueRequest", "false")
    if queued.lower() not in ("true", "false"):
        raise InputError(f"queueRequest is {queued!r:.40}, expected true or false")
    return queued.lower() == "true"


def _note(text: str) -> Note:
    return {"code": _NOTE_CODE, "message": text}


def _receipts_asked(request: Request) -> ReceiptStore | None:
    """Return what makes the answer's receipt; None: it is not asked for.

    By a header, since the body's fields are the model card's.

    Raises:
        InputError: the header is neither true nor false, or the weights have no digest.
    """
    asked = request.headers.get("x-receipt", "false")
    if asked.lower() not in ("true", "false"):
        raise InputError(f"the header x-receipt is {asked!r:.40}, expected true or false")
    if asked.lower() == "false":
        return None
    service = service_of(request)
    check_digest(service.llm.engine.environment)
    return service.receipts


async def _events(answers: Answers, notes: list[Note], receipts: ReceiptStore | None) -> Events:
    async with contextlib.aclosing(answers.stream()) as parts:
        async for _, part in parts:
            if isinstance(part, Result):
                ending: dict[str, Any] = {"response": "", **await _metadata(part, receipts)}
                yield event(ending | {"messages": notes} if notes else ending)
            elif part.text:
                yield event({"response": part.text})
    yield DONE


async def _metadata(result: Result, receipts: ReceiptStore | None) -> Metadata:
    """Return the fields beside the text."""
    metadata: Metadata = {
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.completion_tokens,
            "total_tokens": result.usage.total_tokens,
        },
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "fingerprint": result.fingerprint,
    }
    if receipts is not None:
        metadata["receipt"] = await in_thread(receipts.make, result)
    return metadata


def _describe(service: Service, name: str) -> ModelEntry:
    """Return the model's entry in the list of models, by one of its names."""
    return {
        "id": "llama_jax",
        "source": 1,
        "name": name,
        "description": "Llama 2 chat, served by llama_jax.",
        "task": {"id": "text-generation", "name": _TASK, "description": "Continues a dialog."},
        "created_at": "2023-07-18 00:00:00.000",
        "tags": [],
        "properties": [
            {"property_id": "context_window", "value": str(service.llm.context)},
            {"property_id": "max_total_tokens", "value": str(service.llm.context)},
        ],
    }


class _SearchQuery:
    """The checked query of a search."""

    def __init__(self, params: QueryParams):
        self._params = params
        self.page = self._number("page", 1, MAX_PAGE)
        self.per_page = self._number("per_page", 20, MAX_PER_PAGE)
        if params.get("hide_experimental", "true") not in ("true", "false"):
            raise InputError(
                f"hide_experimental is {params['hide_experimental']!r:.40}, expected true or false"
            )

    def matches(self, model: ModelEntry) -> bool:
        """Whether the model matches; it is not experimental."""
        params = self._params
        text = f"{model['name']} {model['description']}".lower()
        author = model["name"].split("/")[-2:][0]
        return (
            params.get("search", "").lower() in text
            and params.get("task", _TASK).lower() == _TASK.lower()
            and params.get("author", author).lower() == author.lower()
            and params.get("source", "1") in ("1", "1.0")
        )

    def _number(self, name: str, default: int, largest: int) -> int:
        text = self._params.get(name, str(default))
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:20]) <= largest):
            raise InputError(f"{name} is {text!r:.40}, expected an integer from 1 to {largest}")
        return int(text)
