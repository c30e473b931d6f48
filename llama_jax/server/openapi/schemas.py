"""The JSON Schemas of all bodies but the native route's request, which is the model card's own."""

from typing import Any

from llama_jax.card import schemas as card
from llama_jax.decode.sampling import TOP_LOGPROBS
from llama_jax.engine.parameters import SCHEMAS as PARAMETERS
from llama_jax.server.openai.requests import (
    COMPLETION_PARAMETERS,
    MAX_CHOICES,
    MAX_COMPLETION_LOGPROBS,
    UNSUPPORTED,
)
from llama_jax.strict_json import parse_json

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FINISH_REASON: Schema = {"enum": ["stop", "length"]}


def an_object(**properties: Schema) -> Schema:
    """Return the schema of an object that has these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def without(schema: Schema, *names: str) -> Schema:
    """Let properties of an object be left out."""
    required = [name for name in schema["required"] if name not in names]
    return {**schema, "required": required}


def an_array(items: Schema, **more: Any) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **more}


def or_null(schema: Schema) -> Schema:
    """Allow null as well."""
    return {"anyOf": [schema, NULL]}


def a_number(low: float, high: float, kind: str = "integer") -> Schema:
    """Return the schema of a number within bounds."""
    return {"type": kind, "minimum": low, "maximum": high}


def schemas(model: str) -> dict[str, Schema]:
    """Return every schema by the name that paths refer to it by."""
    native_usage = an_object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
    return {
        "RunRequest": parse_json(card.INPUT_SCHEMA, "card/input.json"),
        "RunResponse": _envelope(
            an_object(
                response=or_null(STRING),
                tool_calls=an_array({}, maxItems=0),
                usage=native_usage,
                finish_reason=FINISH_REASON,
                seed=COUNT,
                fingerprint=STRING,
            )
        ),
        "SearchResponse": _envelope(
            an_array(_model_entry()),
            result_info=an_object(
                count=COUNT, page=COUNT, per_page=COUNT, total_count=COUNT, total_pages=COUNT
            ),
        ),
        "SchemaResponse": _envelope(an_object(input={"type": "object"}, output={"type": "object"})),
        "ChatRequest": _chat_request(model),
        "ChatResponse": _completion("chat.completion", model, _chat_choice()),
        "CompletionRequest": _completion_request(model),
        "CompletionResponse": _completion("text_completion", model, _completion_choice()),
        "ModelList": an_object(object={"const": "list"}, data=an_array(_model(model))),
        "Model": _model(model),
        "Error": _error(),
    }


def _envelope(result: Schema, **more: Schema) -> Schema:
    return an_object(
        result=result,
        success={"const": True},
        errors=an_array({}, maxItems=0),
        messages=an_array(an_object(code=INTEGER, message=STRING)),
        **more,
    )


def _error() -> Schema:
    reason = an_object(code=INTEGER, message=STRING)
    told = an_object(code=INTEGER, message=STRING, error_chain=an_array(reason))
    return an_object(
        errors=an_array(without(told, "error_chain"), minItems=1, maxItems=1),
        success={"const": False},
        result={"anyOf": [{"type": "object", "maxProperties": 0}, NULL]},
        messages=an_array({}, maxItems=0),
        error=an_object(message=STRING, type=STRING, param=or_null(STRING), code=STRING),
    )


def _model_entry() -> Schema:
    return an_object(
        id=STRING,
        source=INTEGER,
        name=STRING,
        description=STRING,
        task=an_object(id=STRING, name=STRING, description=STRING),
        created_at=STRING,
        tags=an_array(STRING),
        properties=an_array(an_object(property_id=STRING, value=STRING)),
    )


def _model(model: str) -> Schema:
    return an_object(id={"const": model}, object={"const": "model"}, created=COUNT, owned_by=STRING)


def _request(model: str, required: list[str], properties: dict[str, Schema]) -> Schema:
    """Return an OpenAI request's schema: what is its own, and what both have."""
    text: Schema = {"type": "string", "minLength": 1}
    shared: dict[str, Schema] = {
        "n": a_number(1, MAX_CHOICES),
        "best_of": a_number(1, MAX_CHOICES),
        "stop": {"anyOf": [text, an_array(text, maxItems=PARAMETERS["stop"]["maxItems"])]},
        "ignore_eos": BOOLEAN,
        "stream": BOOLEAN,
        "max_completion_tokens": INTEGER,
        "stream_options": {"type": "object", "properties": {"include_usage": or_null(BOOLEAN)}},
    }
    optional = {name: or_null(schema) for name, schema in {**shared, **properties}.items()}
    refused = {name: {"enum": [*values, None]} for name, values in UNSUPPORTED.items()}
    always = {name: properties[name] for name in required}
    return {
        "type": "object",
        "properties": {"model": {"const": model}, **optional, **refused, **always},
        "required": ["model", *required],
    }


def _chat_request(model: str) -> Schema:
    branches = parse_json(card.INPUT_SCHEMA, "card/input.json")["oneOf"]
    [chat] = [b["properties"] for b in branches if "messages" in b["properties"]]
    # The card lets any role and an empty list pass; Llama 2 has no tokens for them.
    turn = {**chat["messages"]["items"]}
    turn["properties"] = {**turn["properties"], "role": {"enum": ["system", "user", "assistant"]}}
    own = {
        "messages": an_array(turn, minItems=1),
        "logprobs": BOOLEAN,
        "top_logprobs": a_number(0, TOP_LOGPROBS),
    }
    return _request(model, ["messages"], {**chat, **own})


def _completion_request(model: str) -> Schema:
    text: Schema = {"type": "string", "minLength": 1}
    ids = an_array(COUNT, minItems=1)
    prompt = {"anyOf": [text, ids, an_array({"anyOf": [text, ids]}, minItems=1)]}
    parameters = {name: PARAMETERS[name] for name in sorted(COMPLETION_PARAMETERS - {"stop"})}
    own = {"logprobs": a_number(0, MAX_COMPLETION_LOGPROBS), "echo": BOOLEAN}
    return _request(model, ["prompt"], {"prompt": prompt, **parameters, **own})


def _completion(kind: str, model: str, choice: Schema) -> Schema:
    usage = an_object(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=an_object(cached_tokens=COUNT),
    )
    whole = an_object(
        id=STRING,
        object={"const": kind},
        created=COUNT,
        model={"const": model},
        choices=an_array(choice, minItems=1),
        usage=usage,
        system_fingerprint=STRING,
        warnings=an_array(STRING),
    )
    return without(whole, "warnings")


def _chat_choice() -> Schema:
    spelt = or_null(an_array(a_number(0, 255)))
    likely = an_object(token=STRING, logprob=NUMBER, bytes=spelt)
    entry = an_object(token=STRING, logprob=NUMBER, bytes=spelt, top_logprobs=an_array(likely))
    return an_object(
        index=COUNT,
        message=an_object(role={"const": "assistant"}, content=STRING, refusal=NULL),
        logprobs=or_null(an_object(content=an_array(entry), refusal=NULL)),
        finish_reason=FINISH_REASON,
        stop_reason=NULL,
        seed=COUNT,
    )


def _completion_choice() -> Schema:
    likeliest = {"type": "object", "additionalProperties": NUMBER}
    logprobs = an_object(
        tokens=an_array(STRING),
        token_logprobs=an_array(or_null(NUMBER)),
        top_logprobs=an_array(or_null(likeliest)),
        text_offset=an_array(COUNT),
    )
    return an_object(
        index=COUNT,
        text=STRING,
        logprobs=or_null(logprobs),
        finish_reason=FINISH_REASON,
        seed=COUNT,
    )
