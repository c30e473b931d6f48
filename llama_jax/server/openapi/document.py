"""OpenAPI: the description of all routes, for people, client generators and fuzzers."""

from typing import Any

from llama_jax.server.auth import OPEN_PATHS
from llama_jax.server.openapi.batches import batch_paths
from llama_jax.server.openapi.schemas import schemas
from llama_jax.server.workers_ai import MAX_PAGE, MAX_PER_PAGE
from llama_jax.version import __version__

_STRING = {"type": "string"}
_ERRORS = {
    400: "The request is invalid, or its token is missing or malformed.",
    401: "The token is wrong.",
    403: "The request names another host or comes from a page that is not allowed.",
    404: "No such route.",
    408: "The request exceeded the time limit.",
    413: "The body is too large, or prompt and max_tokens exceed the context.",
    500: "Internal error.",
}
_BUSY = {
    429: "The queue, or the client's share of it, is full.",
    503: "The model is warming up, the server is shutting down, or too many requests are open.",
}


def document(models: tuple[str, ...]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server of one model.

    Args:
        models: its names.
    """
    paths = _paths({"enum": list(models)})
    for path, item in paths.items():
        for operation in item.values():
            if "{account}" in path:
                operation["parameters"].append(_path("account", {"type": "string", "minLength": 1}))
            if path in OPEN_PATHS:
                operation["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama_jax", "version": __version__},
        "security": [{"token": []}, {"key": [], "email": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas(models),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Auth-Key"},
                "email": {"type": "apiKey", "in": "header", "name": "X-Auth-Email"},
            },
        },
    }


def _paths(name: dict[str, Any]) -> dict[str, Any]:
    """Return every path.

    Args:
        name: the schema of a name of the model.
    """
    native = "/client/v4/accounts/{account}/ai"
    paths = {
        "/": _get("Get the playground page.", {"text/html": _STRING}),
        "/healthz": _get("Check that the process is alive.", {"text/plain": _STRING}),
        "/health": _get("Check that the server accepts requests.", {"text/plain": _STRING}),
        "/readyz": _get("Check that the server accepts requests.", {"text/plain": _STRING}),
        "/openapi.json": _get("Get this document.", {"application/json": {"type": "object"}}),
        "/metrics": _get("Get the metrics in Prometheus' text format.", {"text/plain": _STRING}),
        "/receipts/{receipt_id}": _get(
            "Get the receipt of an answer.", _json("Receipt"), _path("receipt_id", _STRING)
        ),
        f"{native}/run/{{model}}": _post(
            "Run the model.", "Run", _path("model", name), _ASKS_FOR_RECEIPT, _QUEUES
        ),
        f"{native}/models/search": _get("Search for models.", _json("SearchResponse"), *_SEARCH),
        f"{native}/models/schema": _get(
            "Get the model card's two schemas.",
            _json("SchemaResponse"),
            _query("model", name, required=True),
        ),
    }
    paths["/receipts/{receipt_id}"]["get"]["responses"] |= _refusals({404: "It is not here."})
    run = paths[f"{native}/run/{{model}}"]["post"]
    for queued, described in (
        ("QueueRequest", run["requestBody"]["content"]["application/json"]),
        ("QueueResponse", run["responses"]["200"]["content"]["application/json"]),
    ):
        described["schema"] = {"anyOf": [described["schema"], _ref(queued)]}
    run["responses"] |= _refusals({507: "There is no room for more requests."})
    for ready in ("/health", "/readyz"):
        paths[ready]["get"]["responses"]["503"] = {
            "description": "The model is warming up, or the server is shutting down.",
            "content": {"text/plain": {"schema": _STRING}},
        }
    for base in ("/v1", f"{native}/v1"):
        paths |= {
            f"{base}/chat/completions": _post("Create a chat completion.", "Chat"),
            f"{base}/completions": _post("Create a completion.", "Completion"),
            **batch_paths(base, lambda texts: _refusals(_ERRORS | texts)),
            f"{base}/models": _get("List the model by its names.", _json("ModelList")),
            f"{base}/models/{{model}}": _get(
                "Get the model.", _json("Model"), _path("model", name)
            ),
        }
    for base in ("", native):
        paths |= {
            f"{base}/tokenize": _post("Encode text or a dialog.", "Tokenize", streams=False),
            f"{base}/detokenize": _post("Decode token ids.", "Detokenize", streams=False),
            f"{base}/tokenizer_info": _get("Get the tokenizer's form.", _json("TokenizerInfo")),
        }
    return paths


def _get(summary: str, content: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in content.items()}
    responses = {"200": {"description": "Success.", "content": content}, **_refusals(_ERRORS)}
    return {"get": {"summary": summary, "parameters": [*parameters], "responses": responses}}


def _post(
    summary: str, name: str, *parameters: dict[str, Any], streams: bool = True
) -> dict[str, Any]:
    request = {"application/json": {"schema": _ref(f"{name}Request")}}
    answer = {"application/json": {"schema": _ref(f"{name}Response")}}
    if streams:
        text = "JSON events; the last event is [DONE]."
        answer["text/event-stream"] = {"schema": {"description": text}}
    description = "The response, whole or streamed." if streams else "The response."
    headers = {"headers": _RECEIPT_IDS} if streams else {}
    return {
        "post": {
            "summary": summary,
            "parameters": [*parameters, *(_SESSION if streams else ())],
            "requestBody": {"required": True, "content": request},
            "responses": {
                "200": {"description": description, "content": answer, **headers},
                **_refusals(_ERRORS | (_BUSY if streams else {})),
            },
        }
    }


def _refusals(texts: dict[int, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {
        str(status): {"description": text, "content": content} for status, text in texts.items()
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": _ref(name)}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": schema}


_SEARCH = (
    *(_query(name, _STRING) for name in ("search", "task", "author", "source")),
    _query("hide_experimental", {"type": "boolean"}),
    _query("page", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}),
    _query("per_page", {"type": "integer", "minimum": 1, "maximum": MAX_PER_PAGE}),
)
_ASKS_FOR_RECEIPT = {
    "name": "X-Receipt",
    "in": "header",
    "description": "Whether the result has the receipt.",
    "schema": {"enum": ["true", "false"]},
}
_QUEUES = {
    **_query("queueRequest", {"enum": ["true", "false"]}),
    "description": "Whether the body has `requests` to answer later, or their `request_id`.",
}
_SESSION = tuple(
    {
        "name": name,
        "in": "header",
        "description": "The session's name, for a router in front. It is logged.",
        "schema": _STRING,
    }
    for name in ("X-Session-ID", "x-session-affinity")
)
_RECEIPT_IDS = {
    "x-receipt-id": {
        "description": "The ids of the choices' receipts, with commas, if the server keeps them.",
        "schema": _STRING,
    }
}
