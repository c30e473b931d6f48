"""OpenAPI: the description of all routes, for people, generators of clients and fuzzers."""

from typing import Any

from llama_jax.server.auth import OPEN_PATHS
from llama_jax.server.openapi.schemas import BOOLEAN, STRING, a_number, schemas
from llama_jax.server.workers_ai import MAX_PAGE, MAX_PER_PAGE
from llama_jax.version import __version__

_ERRORS = {
    400: "The request is wrong, or has no token that can be read.",
    401: "The token is wrong.",
    403: "The server is addressed by the name of another host.",
    404: "There is no such route.",
    408: "The request took too long.",
    413: "The body is too large, or prompt and max_tokens do not fit the context.",
    500: "A fault of the server.",
}
_BUSY = {
    429: "As many requests wait as may.",
    503: "The model is being loaded, or the server is shutting down.",
}


def document(model: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server of one model."""
    native = "/client/v4/accounts/{account}/ai"
    paths = {
        "/": _get("The playground page.", {"text/html": STRING}),
        "/healthz": _get("Whether the process lives.", {"text/plain": STRING}),
        "/readyz": _get("Whether requests are taken.", {"text/plain": STRING}),
        "/openapi.json": _get("This document.", {"application/json": {"type": "object"}}),
        "/metrics": _get("Metrics for Prometheus.", {"text/plain": STRING}),
        f"{native}/run/{{model}}": _post("Generate.", "Run", _path("model", {"const": model})),
        f"{native}/models/search": _get("Search for models.", _json("SearchResponse"), *_SEARCH),
        f"{native}/models/schema": _get(
            "The model card's two schemas.",
            _json("SchemaResponse"),
            _query("model", {"const": model}, required=True),
        ),
    }
    paths["/readyz"]["get"]["responses"]["503"] = {
        "description": "Not yet, or not any more.",
        "content": {"text/plain": {"schema": STRING}},
    }
    for base in ("/v1", f"{native}/v1"):
        named = _path("model", {"const": model})
        paths |= {
            f"{base}/chat/completions": _post("Answer a dialog.", "Chat"),
            f"{base}/completions": _post("Go on with a text.", "Completion"),
            f"{base}/models": _get("List the model.", _json("ModelList")),
            f"{base}/models/{{model}}": _get("Describe the model.", _json("Model"), named),
        }
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
            "schemas": schemas(model),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Auth-Key"},
                "email": {"type": "apiKey", "in": "header", "name": "X-Auth-Email"},
            },
        },
    }


def _get(summary: str, content: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in content.items()}
    responses = {"200": {"description": "Done.", "content": content}, **_refusals(_ERRORS)}
    return {"get": {"summary": summary, "parameters": [*parameters], "responses": responses}}


def _post(summary: str, name: str, *parameters: dict[str, Any]) -> dict[str, Any]:
    request = {"application/json": {"schema": _ref(f"{name}Request")}}
    answer = {
        "application/json": {"schema": _ref(f"{name}Response")},
        "text/event-stream": {"schema": {"description": "Events of JSON; the last is [DONE]."}},
    }
    return {
        "post": {
            "summary": summary,
            "parameters": [*parameters],
            "requestBody": {"required": True, "content": request},
            "responses": {
                "200": {"description": "The answer, whole or as it comes.", "content": answer},
                **_refusals(_ERRORS | _BUSY),
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
    *(_query(name, STRING) for name in ("search", "task", "author", "source")),
    _query("hide_experimental", BOOLEAN),
    _query("page", a_number(1, MAX_PAGE)),
    _query("per_page", a_number(1, MAX_PER_PAGE)),
)
