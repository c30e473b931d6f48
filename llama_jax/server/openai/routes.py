"""OpenAI's routes: chat completions, completions, and the list of models."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama_jax.demo import is_demo
from llama_jax.engine.result import Result
from llama_jax.server.answers import Answers
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.in_thread import in_thread
from llama_jax.server.openai.requests import ParsedRequest, parse_chat, parse_completion
from llama_jax.server.openai.responses import (
    ChatChoices,
    CompletionChoices,
    head,
    usage,
    warnings,
    whole_body,
)
from llama_jax.server.openai.types import Model
from llama_jax.server.request_log import request_log_of
from llama_jax.server.service import Service
from llama_jax.server.sse import DONE, Events, EventStream, event
from llama_jax.server.workers_ai import check_model, service_of

_STARTED = int(time.time())


async def chat_completions(request: Request) -> Response:
    """POST .../chat/completions: create a chat completion."""
    service = service_of(request)
    parsed = await _parse(parse_chat, request)
    log = request_log_of(request.scope)
    answers = await service.answer(log, parsed.requests, streamed=parsed.stream)
    return await _respond(request, parsed, answers, ChatChoices(parsed, service.llm.tokenizer))


async def completions(request: Request) -> Response:
    """POST .../completions: continue text or token ids, without the chat format."""
    service = service_of(request)
    parsed = await _parse(parse_completion, request)
    log = request_log_of(request.scope)
    answers = await service.answer(log, parsed.requests, streamed=parsed.stream)
    make = functools.partial(CompletionChoices, parsed, service.llm.tokenizer, answers.prompts)
    try:
        choices = await in_thread(make)  # it decodes the prompts
    except BaseException:  # a cancelled request too: nobody reads what was submitted
        answers.cancel()
        raise
    return await _respond(request, parsed, answers, choices)


async def list_models(request: Request) -> Response:
    """GET .../models: the model served, by each of its names."""
    service = service_of(request)
    models = [_describe(service, name) for name in service.settings.models]
    return CompactJSONResponse({"object": "list", "data": models})


async def get_model(request: Request) -> Response:
    """GET .../models/{model}: the model served."""
    service, name = service_of(request), request.path_params["model"]
    check_model(service, name)
    return CompactJSONResponse(_describe(service, name))


def _describe(service: Service, name: str) -> Model:
    environment = service.llm.engine.environment
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "llama_jax",
        "max_model_len": service.llm.context,
        "checkpoint": environment.checkpoint,
        "is_demo": is_demo(environment.parts["weights"]),
        "dtype": service.llm.dtype,
        "quantization": environment.label,
        "devices": environment.sizes["devices"],
        "device": environment.parts["device"],
    }


async def _parse(
    parse: Callable[[bytes, Sequence[str], int], ParsedRequest], request: Request
) -> ParsedRequest:
    """Parse a body in a thread, as it may have megabytes."""
    service = service_of(request)
    body = await request.body()
    return await in_thread(parse, body, service.settings.models, service.most_answers)


async def _respond(
    request: Request,
    parsed: ParsedRequest,
    answers: Answers,
    choices: ChatChoices | CompletionChoices,
) -> Response:
    """Return the streamed or the whole response."""
    service = service_of(request)
    if parsed.stream:
        fingerprint = service.llm.engine.fingerprint
        first_fields = head(choices.chunk_object, choices.id_prefix, parsed.model, fingerprint)
        events = _events(parsed, answers, choices, first_fields)
        log, keep_alive_s = request_log_of(request.scope), service.settings.keep_alive_s
        return EventStream(log, answers, events, keep_alive_s)
    results = await answers.results()
    # In a thread: the text offsets of a long prompt take a while.
    body = await in_thread(whole_body, parsed, results, choices)
    return CompactJSONResponse(body)


async def _events(
    parsed: ParsedRequest,
    answers: Answers,
    choices: ChatChoices | CompletionChoices,
    first_fields: dict[str, Any],
) -> Events:
    if parsed.include_usage:
        first_fields = first_fields | {"usage": None}
    results: dict[int, Result] = {}
    opened: set[int] = set()
    async with contextlib.aclosing(answers.stream()) as parts:
        async for index, part in parts:
            if index not in opened:
                opened.add(index)
                if opening := choices.opening(index):
                    yield event(first_fields | {"choices": [opening]})
            if not isinstance(part, Result):
                if choice := choices.chunk(index, part):
                    yield event(first_fields | {"choices": [choice]})
                continue
            results[index] = part
            chunk = first_fields | {"choices": [choices.ending(index, part)]}
            if len(results) == len(parsed.requests):
                chunk |= warnings(parsed, (results[i] for i in sorted(results)))
            yield event(chunk)
    if parsed.include_usage:
        counted = usage(parsed, [results[i] for i in sorted(results)])
        yield event(first_fields | {"choices": [], "usage": counted})
    yield DONE
