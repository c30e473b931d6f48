"""Statement: a receipt as JSON, an in-toto Statement v1 with SLSA provenance v1.

A completion is an artifact that is built from weights and a request, so what describes a build
describes it. docs/receipts.md says what each field holds.
"""

import base64
import dataclasses
import datetime
import json
import math
import urllib.parse
from typing import Any

from llama_jax.errors import InputError
from llama_jax.nn.cpu_kernels import library_digest
from llama_jax.provenance.canonical import digest, text_digest, to_hex
from llama_jax.provenance.chain import last_link
from llama_jax.text.chat import CHAT_TEMPLATE
from llama_jax.version import __version__

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PROVENANCE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:llama-jax:docs/receipts.md:v1"
"""What the fields of a completion's provenance mean."""

BUILDER = "urn:llama-jax"

MARGINS = ("margin", "top_k_margin", "top_p_margin", "min_p_margin")
"""Of a draw; one that is infinite at every draw is left out."""


def make_statement(result: Any, *, private: bool = False) -> dict[str, Any]:
    """Return a result's receipt; see `Result.receipt`."""
    record = result.record
    assert record is not None, "a result of the engine has its record"
    environment = record.environment
    check_digest(environment)
    external = external_parameters(record.request)
    internal = internal_parameters(result, record)
    start = chain_start(external, internal)
    internal |= {
        "draws": _columns(record.draws),
        "chain": {"start": start, "end": last_link(start, record.draws)},
    }
    if private:
        external["prompt"] = {"sha256": digest(external["prompt"])}
        internal["promptTokens"] = {"sha256": digest(internal["promptTokens"])}
        del internal["draws"]["token"]
    return {
        "_type": STATEMENT_TYPE,
        "subject": _subjects(result, private),
        "predicateType": PROVENANCE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": external,
                "internalParameters": internal,
                "resolvedDependencies": _dependencies(environment),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"llama_jax": __version__}},
                "metadata": {
                    "invocationId": record.invocation,
                    "startedOn": time_text(record.started),
                    "finishedOn": time_text(record.finished),
                },
            },
        },
    }


def check_digest(environment: Any) -> None:
    """Refuse an environment whose weights have no digest: no receipt can say which they are.

    Raises:
        InputError: it has none.
    """
    if environment.parts.get("weights") is None:
        raise InputError(
            "the weights have no digest, so a receipt could not say which they are; load a "
            "checkpoint that `python -m convert` wrote"
        )


def external_parameters(request: Any) -> dict[str, Any]:
    """Return what was asked: the prompt, and the parameters with every default."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    prompt = {
        name: value
        for name, value in fields.items()
        if name not in ("parameters", "resumed") and value not in (None, False)
    }
    return {"prompt": _plain(prompt), "parameters": parameters_to_json(request.parameters)}


def internal_parameters(result: Any, record: Any) -> dict[str, Any]:
    """Return what was made of it, but for the draws."""
    resumed = len(record.request.resumed)
    return ({"resumed": {"at": resumed}} if resumed else {}) | {
        "promptTokens": result.prompt_tokens,
        "numPromptTokens": len(result.prompt_tokens),
        "template": text_digest(CHAT_TEMPLATE),
        "environment": dict(record.environment.parts),
        "fingerprint": result.fingerprint,
        "sizes": dict(record.environment.sizes),
        "finishReason": result.finish_reason,
    }


def chain_start(external: dict[str, Any], internal: dict[str, Any]) -> str:
    """Return the digest of what a chain of draws begins with: the request and what decides it.

    It is the same in a private receipt, which has digests in place of prompt and ids.
    """

    def public(value: Any) -> Any:
        is_digest = isinstance(value, dict) and value.keys() == {"sha256"}
        return value if is_digest else {"sha256": digest(value)}

    names = ("template", "environment", "fingerprint", "sizes", "resumed")
    return digest(
        {
            "prompt": public(external["prompt"]),
            "parameters": external["parameters"],
            "promptTokens": public(internal["promptTokens"]),
            **{name: internal.get(name) for name in names},
        }
    )


def parameters_to_json(parameters: Any) -> dict[str, Any]:
    """Return parameters as JSON: a seed may exceed 2**53, so it is a string, and keys are."""
    values = _plain(dict(parameters))
    values["seed"] = str(parameters.seed)
    values["logit_bias"] = {str(token): bias for token, bias in parameters.logit_bias.items()}
    return values


def time_text(seconds: float) -> str:
    """Return Unix time as RFC 3339 has it, in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _subjects(result: Any, private: bool) -> list[dict[str, Any]]:
    """Return what was made: the ids, and the text if there is a tokenizer."""
    ids = json.dumps(result.tokens, separators=(",", ":"))
    contents = {"tokens": ids} | ({} if result.response is None else {"text": result.response})
    return [
        {"name": name, "digest": {"sha256": text_digest(content)}}
        | ({} if private else {"content": base64.b64encode(content.encode()).decode()})
        for name, content in contents.items()
    ]


def _columns(draws: list[Any]) -> dict[str, list[Any]]:
    """Return the draws by column."""
    columns: dict[str, list[Any]] = {"token": [draw.token for draw in draws]}
    for name in ("logprob", *MARGINS):
        values = [getattr(draw, name) for draw in draws]
        if name == "logprob" or not all(value == math.inf for value in values):
            columns[name] = [to_hex(value) for value in values]
    return columns


def _dependencies(environment: Any) -> list[dict[str, Any]]:
    """Return what the answer was made of, as in-toto's resource descriptors."""
    parts = environment.parts
    versions = parts["versions"]
    about_weights = {"dtype": parts["dtype"], "verified": environment.verified}
    if environment.label is not None:
        about_weights |= {"quantization": environment.label}
    files = {
        "weights": (parts["weights"], about_weights),
        "config": (digest(parts["config"]), None),
        "llama_jax": (parts["code"], {"version": versions["llama_jax"]}),
    }
    if parts["tokenizer"] is not None:
        files["tokenizer.model"] = (parts["tokenizer"], None)
    if parts["instructions"] is not None:
        files["kernels"] = (library_digest(), {"instructions": parts["instructions"]})
    found = [
        {"name": name, "digest": {"sha256": sha256}}
        | ({} if annotations is None else {"annotations": annotations})
        for name, (sha256, annotations) in files.items()
    ]
    found += [{"name": n, "uri": f"pkg:pypi/{n}@{versions[n]}"} for n in ("jax", "jaxlib")]
    kind = urllib.parse.quote(parts["device"], safe="")
    return [*found, {"name": "device", "uri": f"urn:llama-jax:device:{kind}"}]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
