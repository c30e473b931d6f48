"""The card's input contract: a body is checked as Cloudflare's validator checks it.

The error texts are the service's, character by character: clients may parse them.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jsonschema import Draft202012Validator, ValidationError, validators

from llama_jax.card.schemas import INPUT_SCHEMA
from llama_jax.engine.parameters import SCHEMAS
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.errors import InputError
from llama_jax.strict_json import parse_json

MAX_CONTAINERS = 2**16
"""Objects and arrays in a body; a conversation has one for each message."""

MAX_NAMES = 16
"""How many ignored fields are named."""


class SchemaError(InputError):
    """A body that does not match the card's schema; the message is Cloudflare's."""


@dataclasses.dataclass(frozen=True)
class CardRequest:
    """A body that matches the card's schema: the fields with an effect, and those without."""

    fields: dict[str, Any]
    """Given fields of the matched branch, without `stream`; integers are int, no defaults."""
    stream: bool
    ignored: list[str]
    """Names such as `stop` and `messages[0].name`; one whose value is null is not named."""

    def request(self) -> GenerationRequest:
        """Return the request, with its defaults.

        Raises:
            InputError: the schema allows it and Llama 2 does not, such as an order of roles.
        """
        return make_request(**self.fields)


def parse_body(text: bytes, name: str = "body") -> Any:
    """Parse the JSON of a request.

    Raises:
        InputError: see `parse_json`.
    """
    return parse_json(text, name, max_containers=MAX_CONTAINERS)


def check(payload: Any) -> CardRequest:
    """Check a parsed body against the card's schema; one that is not an object counts as empty.

    Raises:
        SchemaError: it matches none or both of the schema's branches, prompt and messages.
    """
    payload = payload if isinstance(payload, dict) else {}
    failures = [_first_failure(branch, payload) for branch in _BRANCHES]
    matches = failures.count(None)
    if matches != 1:
        details = ", ".join(dict.fromkeys(text for text in failures if text))
        head = f"oneOf at '/' not met, {matches} matches"
        raise SchemaError(f"{head}: {details}" if details else head)
    return _card_request(payload, _BRANCHES[failures.index(None)]["properties"])


def check_extended(payload: Any) -> CardRequest:
    """Check a body that may have the engine's own parameters too.

    They are those of `SCHEMAS` that the card does not have, and a seed beyond the card's range.

    Raises:
        SchemaError: see `check`. `CardRequest.request` checks the engine's own parameters.
    """
    if not isinstance(payload, dict):
        return check(payload)
    known = {name for branch in _BRANCHES for name in branch["properties"]}
    own = {n: v for n, v in payload.items() if n in SCHEMAS and n not in known}
    if type(payload.get("seed")) is int:
        own["seed"] = payload["seed"]
    card = check({name: value for name, value in payload.items() if name not in own})
    return dataclasses.replace(card, fields=card.fields | own)


def _card_request(payload: dict[str, Any], properties: dict[str, Any]) -> CardRequest:
    """Separate the fields of the matched branch from those without effect."""
    ignored = _unknown(payload, properties)
    fields: dict[str, Any] = {
        name: int(value) if properties[name]["type"] == "integer" else value
        for name, value in payload.items()
        if name in properties
    }
    if "messages" in fields:
        known = properties["messages"]["items"]["properties"]
        for i, message in enumerate(fields["messages"]):
            ignored += [f"messages[{i}].{name}" for name in _unknown(message, known)]
        fields["messages"] = [{name: m[name] for name in known} for m in fields["messages"]]
    return CardRequest(
        stream=fields.pop("stream", False), fields=fields, ignored=first_names(ignored)
    )


def first_names(names: Sequence[str]) -> list[str]:
    """Return names to report to a client; of many, the first and how many more there are."""
    more = len(names) - MAX_NAMES
    return [*names[:MAX_NAMES], f"{more:,} more"] if more > 0 else list(names)


def _unknown(given: dict[str, Any], known: dict[str, Any]) -> list[str]:
    return [name for name, value in given.items() if name not in known and value is not None]


def _first_failure(branch: dict[str, Any], payload: dict[str, Any]) -> str | None:
    """Return the text of the first error by a branch; None: the payload matches it."""
    arrays = {name for name, schema in branch["properties"].items() if schema["type"] == "array"}
    given = {  # the service ignores a list whose value is a number, a boolean or null
        name: value
        for name, value in payload.items()
        if name not in arrays or isinstance(value, str | list | dict)
    }
    error = next(_Validator(branch).iter_errors(given), None)
    return None if error is None else _text(error)


def _text(error: ValidationError) -> str:
    path = "/" + "/".join(str(step) for step in error.absolute_path)
    expected: Any = error.validator_value
    match error.validator:
        case "type":
            kinds = ",".join(f"'{kind}'" for kind in _kinds(error.instance))
            return f"Type mismatch of '{path}', '{expected}' not in {kinds}"
        case "required":
            return f"required properties at '{path}' are '{','.join(expected)}'"
        case "minLength":
            return f"Length of '{path}' must be >= {expected} not met"
        case "maxLength":
            return f"Length of '{path}' must be <= {expected}"
        case "minimum":
            return f"'{path}' must be >= {expected}"
        case "maximum":
            return f"'{path}' must be <= {expected}"
    raise NotImplementedError(f"no text for the keyword {error.validator!r}")


def _kinds(value: Any) -> tuple[str, ...]:
    """Return the types of a JSON value, by the names of Cloudflare's validator."""
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case int() | float():
            return ("number", "integer") if value % 1 == 0 else ("number",)
        case str():
            return ("string",)
        case list():
            # to the validator, an array of these alone, up to the first null, may be bytes
            items = itertools.takewhile(lambda item: item is not None, value)
            plain = all(type(item) in (str, int, float) for item in items)
            return ("array", "binary") if plain else ("array",)
    return ("object",)


def _max_length(_validator: Any, bound: int, value: Any, _schema: Any) -> Iterator[ValidationError]:
    """Measure a string in UTF-16 code units, as JavaScript does.

    The card's only minLength is 1, which is the same in any unit.
    """
    if isinstance(value, str) and len(value.encode("utf-16-le", "surrogatepass")) // 2 > bound:
        yield ValidationError("too long")


# On the rest JSON Schema and JavaScript agree: 16.0 is an integer, true is not a number.
_Validator = validators.extend(Draft202012Validator, {"maxLength": _max_length})
_BRANCHES: list[dict[str, Any]] = parse_json(INPUT_SCHEMA, "card/input.json")["oneOf"]
