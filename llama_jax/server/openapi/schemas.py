"""The JSON Schemas of all request and response bodies, by name.

The native route's request is the model card's own schema, and a receipt's the one that it is read
by. The others are those of the types that the server parses and builds.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from llama_jax.card import schemas as card
from llama_jax.engine.parameters import SCHEMAS
from llama_jax.receipt.form import ENVELOPE, STATEMENT
from llama_jax.server.openai import batch_types as batches
from llama_jax.server.openai import types as openai
from llama_jax.server.openai.parameters import PARAMETERS, REFUSED
from llama_jax.server.openai.requests import ChatRequest, CompletionRequest
from llama_jax.server.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from llama_jax.server.types import (
    Error,
    QueueRequest,
    QueueResponse,
    RunResponse,
    SchemaResponse,
    SearchResponse,
)
from llama_jax.strict_json import parse_json

Schema = dict[str, Any]

_TYPES = (
    *(RunResponse, SearchResponse, SchemaResponse, Error),
    *(ChatRequest, openai.ChatResponse, CompletionRequest, openai.CompletionResponse),
    *(openai.Model, openai.ModelList),
    *(QueueRequest, QueueResponse, batches.BatchRequest, batches.BatchObject, batches.BatchList),
    *(batches.FileObject, batches.FileList, batches.FileDeleted),
    *(TokenizeRequest, TokenizeResponse, DetokenizeRequest, DetokenizeResponse, TokenizerInfo),
)
_MODEL_NAMES = (
    *(("ChatRequest", "model"), ("ChatResponse", "model"), ("Model", "id")),
    *(("CompletionRequest", "model"), ("CompletionResponse", "model")),
)
"""The fields that hold the name of the model served."""


class _Exact(GenerateJsonSchema):
    """Responses have no fields but those described; titles that repeat names are left out."""

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> Schema:
        return super().typed_dict_schema(schema) | {"additionalProperties": False}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas(models: Sequence[str]) -> dict[str, Schema]:
    """Return every schema by the name that paths refer to it by."""
    _, generated = TypeAdapter.json_schemas(
        [(each.__name__, "validation", TypeAdapter(each)) for each in _TYPES],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Exact,
    )
    by_name = generated["$defs"]
    for name, field in _MODEL_NAMES:
        by_name[name]["properties"][field] = {"enum": list(models)}
    for name in ("TokenizeRequest", "DetokenizeRequest"):
        by_name[name]["properties"]["model"] = {"enum": [*models, None]}
    for name in ("ChatRequest", "CompletionRequest"):
        by_name[name]["properties"] |= _parameters()
    by_name["RunResult"]["properties"]["receipt"] = {"$ref": "#/components/schemas/Receipt"}
    request = parse_json(card.INPUT_SCHEMA, "card/input.json")
    forms = ("Statement", "Envelope")  # a signed receipt is an envelope
    receipt = {"anyOf": [{"$ref": f"#/components/schemas/{form}"} for form in forms]}
    receipts = {"Receipt": receipt, "Statement": STATEMENT, "Envelope": ENVELOPE}
    return {"RunRequest": request, **receipts, **by_name}


def _parameters() -> Schema:
    """Return the parameters that the engine checks, and those that are refused."""
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "items": text, "maxItems": SCHEMAS["stop"]["maxItems"]}
    known = {name: SCHEMAS[PARAMETERS[name]] for name in sorted(PARAMETERS)}
    known["stop"] = {"anyOf": [text, several]}
    optional = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in known.items()}
    return optional | {name: {"enum": [*values, None]} for name, values in REFUSED.items()}
