"""The JSON Schemas of all request and response bodies, by name.

The native route's request is the model card's own schema. The others are those of the types that
the server parses and builds.
"""

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from llama_jax.card import schemas as card
from llama_jax.engine.parameters import SCHEMAS
from llama_jax.server.openai import types as openai
from llama_jax.server.openai.requests import (
    COMPLETION_PARAMETERS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
)
from llama_jax.server.types import Error, RunResponse, SchemaResponse, SearchResponse
from llama_jax.strict_json import parse_json

Schema = dict[str, Any]

_TYPES = (
    *(RunResponse, SearchResponse, SchemaResponse, Error),
    *(ChatRequest, openai.ChatResponse, CompletionRequest, openai.CompletionResponse),
    *(openai.Model, openai.ModelList),
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


def schemas(model: str) -> dict[str, Schema]:
    """Return every schema by the name that paths refer to it by."""
    _, generated = TypeAdapter.json_schemas(
        [(each.__name__, "validation", TypeAdapter(each)) for each in _TYPES],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Exact,
    )
    by_name = generated["$defs"]
    for name, field in _MODEL_NAMES:
        by_name[name]["properties"][field] = {"const": model}
    completion = {name: SCHEMAS[name] for name in sorted(COMPLETION_PARAMETERS)}
    _add_properties(by_name["CompletionRequest"], completion)
    messages, chat = _card_properties()
    _add_properties(by_name["ChatRequest"], chat)
    by_name["ChatRequest"]["properties"]["messages"] = messages
    by_name["ChatRequest"]["required"].append("messages")
    return {"RunRequest": parse_json(card.INPUT_SCHEMA, "card/input.json"), **by_name}


def _card_properties() -> tuple[Schema, dict[str, Schema]]:
    """Return the messages and the parameters of the card's branch for dialogs."""
    branches = parse_json(card.INPUT_SCHEMA, "card/input.json")["oneOf"]
    [properties] = [b["properties"] for b in branches if "messages" in b["properties"]]
    messages = properties.pop("messages")
    # The card accepts any role and an empty list; Llama 2 has no tokens for them.
    messages["minItems"] = 1
    messages["items"]["properties"]["role"] = {"enum": ["system", "user", "assistant"]}
    return messages, properties


def _add_properties(request: Schema, parameters: dict[str, Schema]) -> None:
    """Add to a request the parameters that the card or the engine checks, and the unsupported."""
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "items": text, "maxItems": SCHEMAS["stop"]["maxItems"]}
    own = {"stop": {"anyOf": [text, several]}, "ignore_eos": SCHEMAS["ignore_eos"]}
    optional = {n: {"anyOf": [s, {"type": "null"}]} for n, s in (parameters | own).items()}
    unsupported = {name: {"enum": [*values, None]} for name, values in UNSUPPORTED.items()}
    request["properties"] |= optional | unsupported
