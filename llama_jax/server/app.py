"""App: the ASGI application with all routes for one model."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llama_jax.llama import Llama
from llama_jax.server import access_log, errors, page, tokens, workers_ai
from llama_jax.server.body_budget import BodyBudget
from llama_jax.server.compact_json import CompactJSONResponse, encode
from llama_jax.server.in_thread import in_thread
from llama_jax.server.metrics import Metrics
from llama_jax.server.middleware import RequestMiddleware
from llama_jax.server.openai import batches, files
from llama_jax.server.openai import routes as openai
from llama_jax.server.openapi import document as openapi
from llama_jax.server.request_log import RequestLog
from llama_jax.server.service import Service
from llama_jax.server.settings import Settings

_ACCOUNT = "/client/v4/accounts/{account}"


def create_app(llm: Llama, settings: Settings | None = None) -> Starlette:
    """Return an ASGI application. Its lifespan runs the engine, so nothing else may run it.

    Args:
        llm: the model to serve.
        settings: None: all defaults.
    """
    return app_of(Service(llm, settings or Settings()))


def app_of(service: Service) -> Starlette:
    """Return the application for a service."""
    settings = service.settings
    budget = BodyBudget(settings.max_body_bytes)
    metrics = Metrics(service.llm, budget, service.receipts)
    if service.batches is not None:
        metrics.watch_batches(service.batches)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()
            await asyncio.to_thread(service.join)  # in a thread: connections still end meanwhile

    def end(log: RequestLog) -> None:
        metrics.observe(log)
        access_log.write(log)

    middleware = [Middleware(RequestMiddleware, settings, budget, end)]
    if settings.allowed_origins:
        # Outside RequestMiddleware, so that these pages can read its errors too.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["DELETE", "GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-receipt-id", "x-seed", "retry-after"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=_routes(),
        middleware=middleware,
        exception_handlers={404: _no_route, 405: _wrong_method},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service, app.state.metrics = service, metrics
    return app


def _routes() -> list[Route]:
    native = f"{_ACCOUNT}/ai"
    routes = [
        Route("/", playground),
        Route("/health", health),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi_json),
        Route("/receipts/{receipt_id}", receipt),
        # Paths arrive decoded, so `{model:path}` matches slashes sent as / or as %2F.
        Route(f"{native}/run/{{model:path}}", workers_ai.run, methods=["POST"]),
        Route(f"{native}/models/search", workers_ai.search_models),
        Route(f"{native}/models/schema", workers_ai.read_schema),
    ]
    for base in ("/v1", f"{native}/v1"):
        routes += [
            Route(f"{base}/chat/completions", openai.chat_completions, methods=["POST"]),
            Route(f"{base}/completions", openai.completions, methods=["POST"]),
            Route(f"{base}/models", openai.list_models),
            Route(f"{base}/models/{{model:path}}", openai.get_model),
            Route(f"{base}/files", files.list_files),
            Route(f"{base}/files", files.create_file, methods=["POST"]),
            Route(f"{base}/files/{{file_id}}", files.get_file),
            Route(f"{base}/files/{{file_id}}", files.delete_file, methods=["DELETE"]),
            Route(f"{base}/files/{{file_id}}/content", files.read_file),
            Route(f"{base}/batches", batches.list_batches),
            Route(f"{base}/batches", batches.create_batch, methods=["POST"]),
            Route(f"{base}/batches/{{batch_id}}", batches.get_batch),
            Route(f"{base}/batches/{{batch_id}}/cancel", batches.cancel_batch, methods=["POST"]),
        ]
    for base in ("", native):
        routes += [
            Route(f"{base}/tokenize", tokens.tokenize, methods=["POST"]),
            Route(f"{base}/detokenize", tokens.detokenize, methods=["POST"]),
            Route(f"{base}/tokenizer_info", tokens.tokenizer_info),
        ]
    return routes


async def playground(request: Request) -> Response:
    """GET /: the playground page."""
    return page.reply(workers_ai.service_of(request).settings.models[0])


async def healthz(request: Request) -> Response:
    """GET /healthz: the process is alive."""
    return PlainTextResponse("ok\n")


async def health(request: Request) -> Response:
    """GET /health: what /readyz says, under the name that routers poll."""
    return await readyz(request)


async def readyz(request: Request) -> Response:
    """GET /readyz: whether the server accepts requests."""
    unready = workers_ai.service_of(request).unready
    if unready is None:
        return PlainTextResponse("ready\n")
    return PlainTextResponse(f"{unready}\n", 503, {"retry-after": "1"})


async def metrics(request: Request) -> Response:
    """GET /metrics: the metrics in Prometheus' text format."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def receipt(request: Request) -> Response:
    """GET /receipts/{id}: the receipt of an answer."""
    receipts = workers_ai.service_of(request).receipts
    return CompactJSONResponse(
        # In a thread: that of a long answer takes some 40 ms.
        await in_thread(lambda: encode(receipts.statement(request.path_params["receipt_id"]))),
        headers={"cache-control": "no-store"},
    )


async def openapi_json(request: Request) -> Response:
    """GET /openapi.json: the OpenAPI document."""
    return CompactJSONResponse(_document(workers_ai.service_of(request).settings.models))


_document = functools.cache(openapi.document)


async def _no_route(request: Request, error: Exception) -> Response:
    raise errors.ApiError(errors.NO_ROUTE, request.method, request.url.path)


async def _wrong_method(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    raise errors.ApiError(errors.WRONG_METHOD, request.method, headers=error.headers)
