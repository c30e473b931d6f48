"""Parameters: how a request's tokens are sampled, checked, with every default explicit."""

import collections
import dataclasses
import difflib
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

from llama_jax.decode.sampling import TOP_LOGPROBS, SamplingParams, make_params
from llama_jax.errors import InputError

DEFAULT_MAX_TOKENS = 256
"""The model card's, where the context has room for so many."""

SCHEMAS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": "integer", "minimum": 0, "default": DEFAULT_MAX_TOKENS},
    "temperature": {"type": "number", "minimum": 0, "maximum": 5, "default": 0.6},
    "top_p": {"type": "number", "minimum": 0, "maximum": 2},
    "top_k": {"type": "integer", "minimum": 1, "maximum": 50},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.0},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "repetition_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0},
    "frequency_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.0},
    "presence_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.0},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,17})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
        "default": {},
    },
    "allowed_tokens": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "minItems": 1,
        "uniqueItems": True,
    },
    "stop": {
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "maxItems": 16,
        "default": (),
    },
    "ignore_eos": {"type": "boolean", "default": False},
    "logprobs": {"type": "integer", "minimum": 0, "maximum": TOP_LOGPROBS},
    "prompt_logprobs": {"type": "boolean", "default": False},
}
"""The type, range and default of each parameter, as JSON Schema.

They are the model card's, with some additions. A seed may be 0 and may have 64 bits. max_tokens has
a floor, and its default may shrink: see `Parameters`. min_p and the parameters after the penalties
are ours. Defaults that the card leaves out are stated: temperature 0.6 is Meta's, and the penalties
are off.
"""

MAX_DRAWN_SEED = 9_999_999_999
"""The card's largest: a drawn seed can be sent anywhere."""

_PYTHON_TYPES = {"integer": int, "number": float, "boolean": bool, "array": tuple, "object": dict}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The effective parameters of one request; `SCHEMAS` has their ranges."""

    max_tokens: int | None
    """Tokens to generate at most. None: DEFAULT_MAX_TOKENS, or what the context has left beside the
    prompt if that is less; a result has the number."""
    temperature: float
    top_p: float | None
    """None: off."""
    top_k: int | None
    """None: off."""
    min_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float] = dataclasses.field(hash=False)
    """Added to the logits of some token ids."""
    allowed_tokens: tuple[int, ...] | None
    """The only token ids that may be drawn; EOS is no exception. None: all."""
    stop: tuple[str, ...]
    """The text ends before the first of these strings."""
    ignore_eos: bool
    """Continue past the end-of-sequence token."""
    logprobs: int | None
    """The most likely tokens to return with each generated one; None: no log-probabilities."""
    prompt_logprobs: bool
    """Return the log-probabilities of the prompt's tokens too."""

    def keys(self) -> tuple[str, ...]:
        """Return the names: with `__getitem__`, `**parameters` sends them again."""
        return tuple(SCHEMAS)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def check_token_ids(self, num_ids: int) -> None:
        """Refuse a bias or a mask for token ids that cannot be drawn.

        Args:
            num_ids: the ids below it can be drawn.

        Raises:
            InputError: naming the first other id.
        """
        for name in ("logit_bias", "allowed_tokens"):
            for token in self[name] or ():
                if token >= num_ids:
                    raise InputError(
                        f"{name} has the token id {token}, expected ids from 0 to {num_ids - 1}"
                    )


def make_parameters(values: dict[str, Any]) -> Parameters:
    """Give every value its type, fill in the defaults, and draw a seed if none is given.

    Args:
        values: by name, without problems; None stands for the default.
    """
    typed: dict[str, Any] = {}
    for name, schema in SCHEMAS.items():
        value = schema.get("default") if values.get(name) is None else values[name]
        typed[name] = None if value is None else _PYTHON_TYPES[schema["type"]](value)
    if values.get("max_tokens") is None:
        typed["max_tokens"] = None  # the default depends on the prompt's length
    # In JSON the ids are strings.
    typed["logit_bias"] = {int(id_): float(bias) for id_, bias in typed["logit_bias"].items()}
    if typed["seed"] is None:
        typed["seed"] = 1 + secrets.randbelow(MAX_DRAWN_SEED)
    return Parameters(**typed)


def sampling_params(parameters: Parameters) -> SamplingParams:
    """Return what a slot samples by, of shape [1]."""
    return make_params(
        seed=parameters.seed,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        presence_penalty=parameters.presence_penalty,
    )


def parameter_problems(values: dict[str, Any], others: Sequence[str] = ()) -> list[str]:
    """Return what is wrong with the values of parameters: what, got and expected.

    Args:
        values: by name, none of them None.
        others: further names that a misspelled one may have meant.
    """
    names = (*others, *SCHEMAS)
    problems = []
    for name, value in values.items():
        schema = SCHEMAS.get(name)
        if schema is None:
            close = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {close[0]}?" if close else f"expected {', '.join(names)}"
            problems.append(f"unknown parameter {name!r}, {meant}")
        elif problem := parameter_problem(name, value, schema):
            problems.append(problem)
    return problems


def parameter_problem(name: str, value: Any, schema: dict[str, Any]) -> str | None:
    """Return what is wrong with a parameter's value; None: nothing.

    Args:
        name: what to call it.
        value: not None.
        schema: its entry in `SCHEMAS`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}, expected a finite number"
    if schema is SCHEMAS["logit_bias"]:
        return _bias_problem(name, value, schema)
    if schema is SCHEMAS["allowed_tokens"]:
        return _ids_problem(name, value)
    if not jsonschema.Draft202012Validator(schema).is_valid(value):
        return f"{name} is {value!r:.40}, expected {_expected(schema)}"
    return None


def _bias_problem(name: str, value: Any, schema: dict[str, Any]) -> str | None:
    """Return what `parameter_problem` does, naming the entry."""
    most, bias_schema = schema["maxProperties"], schema["additionalProperties"]
    if not isinstance(value, dict):
        expected = f"an object of token ids, each with {_expected(bias_schema)}"
        return f"{name} is {value!r:.40}, expected {expected}"
    if len(value) > most:
        return f"{name} has {len(value):,} token ids, expected at most {most:,}"
    for token, bias in value.items():
        if not re.fullmatch(schema["propertyNames"]["pattern"], str(token)):
            return f"{name} has the key {token!r:.40}, expected a token id"
        if problem := parameter_problem(f"{name}[{token}]", bias, bias_schema):
            return problem
    return None


def _ids_problem(name: str, value: Any) -> str | None:
    """Return what `parameter_problem` does: jsonschema takes 0.3 s for a whole vocabulary."""
    if not isinstance(value, list) or not value:
        return f"{name} is {value!r:.40}, expected a list of at least 1 token id"
    for i, token in enumerate(value):
        if type(token) is not int or token < 0:
            return f"{name}[{i}] is {token!r:.40}, expected a token id"
    if len(set(value)) < len(value):
        [(twice, _)] = collections.Counter(value).most_common(1)
        return f"{name} has {twice} more than once, expected each token id once"
    return None


def _expected(schema: dict[str, Any]) -> str:
    """Describe what a parameter's schema allows."""
    if schema["type"] == "array":
        return f"a string, or a list of up to {schema['maxItems']} that are not empty"
    kind = {"integer": "an integer", "number": "a number", "boolean": "true or false"}
    expected = kind[schema["type"]]
    if "minimum" in schema:
        expected += f" from {schema['minimum']}"
    if "maximum" in schema:
        expected += f" to {schema['maximum']}"
    elif "minimum" in schema:
        expected += " up"
    return expected
