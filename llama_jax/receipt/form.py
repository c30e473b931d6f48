"""Form: which fields a receipt must have, of which type and range, as JSON Schema."""

from typing import Any

from llama_jax.engine.draw import Draw
from llama_jax.engine.parameters import SCHEMAS
from llama_jax.provenance.statement import BUILD_TYPE, PROVENANCE_TYPE, STATEMENT_TYPE
from llama_jax.receipt.envelope import PAYLOAD_TYPE

_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_DIGEST = {
    "type": "object",
    "properties": {"sha256": _SHA256},
    "required": ["sha256"],
    "additionalProperties": False,
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_FLOATS = {"type": "array", "items": {"type": "string", "maxLength": 40}}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_SEED = {"type": "string", "pattern": "^[0-9]{1,20}$"}


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter that may be null; a receipt has no defaults."""
    return {"anyOf": [{k: v for k, v in schema.items() if k != "default"}, {"type": "null"}]}


_PARAMETERS = {name: _optional(schema) for name, schema in SCHEMAS.items()} | {"seed": _SEED}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of an object; fields that are not named here are ignored."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
    }


_PROMPT = {
    "type": "object",
    "properties": {
        "messages": {"type": "array"},
        "raw_prompt": {"type": "string"},
        "prompt_tokens": _IDS,
    },
    "additionalProperties": {"type": "boolean"},
}
_RESUMED = {"type": "object", "properties": {"at": {"type": "integer", "minimum": 1}}}

_INTERNAL = _object(
    {
        "promptTokens": {"anyOf": [_IDS | {"minItems": 1}, _DIGEST]},
        "numPromptTokens": {"type": "integer", "minimum": 1},
        "template": _SHA256,
        "environment": _object(
            {
                "weights": _SHA256,
                "tokenizer": {"anyOf": [_SHA256, {"type": "null"}]},
                "config": _object({"eos_tokens": _IDS}),
                "dtype": {"enum": ["float32", "float16", "bfloat16"]},
                "plan": {"type": "object"},
                "invariance": {"enum": ["batch", "slots", "none"]},
                "sampler": {"type": "integer"},
                "versions": {"type": "object"},
            }
        ),
        "fingerprint": {"type": "string"},
        "sizes": {"type": "object"},
        "finishReason": {"enum": ["stop", "length", "cancelled"]},
        "draws": _object(
            {"logprob": _FLOATS},
            {"token": _IDS} | {n: _FLOATS for n in Draw._fields if n.endswith("margin")},
        ),
        "chain": _object({"start": _SHA256, "end": _SHA256}),
    },
    {"resumed": _RESUMED},
)

STATEMENT = _object(
    {
        "_type": {"const": STATEMENT_TYPE},
        "subject": {
            "type": "array",
            "items": _object({"name": {"type": "string"}, "digest": _DIGEST}),
            "minItems": 1,
        },
        "predicateType": {"const": PROVENANCE_TYPE},
        "predicate": _object(
            {
                "buildDefinition": _object(
                    {
                        "buildType": {"const": BUILD_TYPE},
                        "externalParameters": _object(
                            {
                                "prompt": {"anyOf": [_DIGEST, _PROMPT]},
                                "parameters": {"type": "object", "properties": _PARAMETERS},
                            }
                        ),
                        "internalParameters": _INTERNAL,
                        "resolvedDependencies": {"type": "array", "items": {"type": "object"}},
                    }
                ),
                "runDetails": _object({"metadata": _object({"invocationId": {"type": "string"}})}),
            }
        ),
    }
)
"""Of the whole statement."""

ENVELOPE = _object(
    {
        "payload": _BASE64,
        "payloadType": {"const": PAYLOAD_TYPE},
        "signatures": {
            "type": "array",
            "items": _object({"keyid": {"type": "string"}, "sig": _BASE64}),
            "minItems": 1,
        },
    }
)
"""Of a signed statement, which is the payload."""
