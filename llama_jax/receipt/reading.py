"""Reading: from the JSON of a receipt to its fields, and to what in it does not fit together."""

import base64
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from llama_jax.engine.draw import Draw
from llama_jax.engine.environment import Environment
from llama_jax.engine.parameters import SCHEMAS, Parameters, make_parameters, parameter_problems
from llama_jax.engine.request import GenerationRequest
from llama_jax.errors import InputError
from llama_jax.provenance.canonical import digest, from_hex, text_digest
from llama_jax.provenance.chain import last_link
from llama_jax.provenance.statement import MARGINS, chain_start
from llama_jax.receipt.envelope import open_envelope, parse_envelope
from llama_jax.receipt.form import STATEMENT
from llama_jax.receipt.keys import PublicKey
from llama_jax.regular_file import open_regular
from llama_jax.strict_json import parse_json

_MAX_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Receipt:
    """A receipt's fields; `problems` says whether they fit together."""

    statement: dict[str, Any]
    is_private: bool
    """It has digests in place of prompt, ids and text; the fields for these are then empty."""
    prompt: dict[str, Any]
    """The fields of a `GenerationRequest` but the parameters."""
    prompt_tokens: list[int]
    parameters: Parameters
    environment: Environment
    draws: list[Draw]
    finish_reason: str
    text: str | None
    """None: private, or there was no tokenizer."""

    @property
    def internal(self) -> dict[str, Any]:
        """What was made of the request."""
        return self.statement["predicate"]["buildDefinition"]["internalParameters"]

    @property
    def invocation(self) -> str:
        """The name of the run."""
        return self.statement["predicate"]["runDetails"]["metadata"]["invocationId"]

    @property
    def num_draws(self) -> int:
        """How many there are, that of the stop token included."""
        return len(self.internal["draws"]["logprob"])

    @property
    def tokens(self) -> list[int]:
        """The ids of the answer: those drawn, without the stop token."""
        ids = [draw.token for draw in self.draws]
        stops = () if self.parameters.ignore_eos else self.environment.parts["config"]["eos_tokens"]
        return ids[:-1] if ids and ids[-1] in stops else ids

    @property
    def resumed(self) -> int:
        """How many of its first draws it took over from another run."""
        return self.internal.get("resumed", {}).get("at", 0)

    def request(self) -> GenerationRequest:
        """Return the request that it answers."""
        fields: dict[str, Any] = {"messages": None, "raw_prompt": None, "prompt_tokens": None}
        fields |= self.prompt
        for name in ("messages", "prompt_tokens"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        resumed = tuple(self.draws[: self.resumed])
        return GenerationRequest(**fields, parameters=self.parameters, resumed=resumed)

    def continuation(self, at: int, **parameters: Any) -> GenerationRequest:
        """Return a request that continues its run.

        Args:
            at: the draw to begin with, from 0; those before are taken over.
            **parameters: fields of `Parameters` that are to be others; with none of them the rest
                of the run is repeated.

        Raises:
            InputError: it is private, or has no such draw.
        """
        if self.is_private:
            raise InputError(f"receipt {self.invocation} is private: it has no draws to continue")
        if not 0 <= at <= len(self.tokens):
            raise InputError(
                f"the run of receipt {self.invocation} has {len(self.tokens):,} tokens, and is to "
                f"be continued at {at:,}; expected 0 to {len(self.tokens):,}"
            )
        changed = dataclasses.replace(self.parameters, **parameters)
        return dataclasses.replace(
            self.request(), parameters=changed, resumed=tuple(self.draws[:at])
        )

    @functools.cached_property
    def problems(self) -> list[str]:
        """Return which of its own digests and counts fail: it was edited, or cut off."""
        definition = self.statement["predicate"]["buildDefinition"]
        internal, found = self.internal, []
        if self.environment.fingerprint != internal["fingerprint"]:
            found.append("the fingerprint is not that of the environment")
        if chain_start(definition["externalParameters"], internal) != internal["chain"]["start"]:
            found.append("the chain does not begin with this request and environment")
        found += _dependency_problems(definition, self.environment)
        if not self.is_private:
            if len(self.prompt_tokens) != internal["numPromptTokens"]:
                found.append("numPromptTokens is not the number of promptTokens")
            if self.resumed > len(self.draws):
                found.append(f"it continues {self.resumed} draws, and has {len(self.draws)}")
            found += self._draw_problems()
        return found

    def _draw_problems(self) -> list[str]:
        found = []
        chain = self.internal["chain"]
        if last_link(chain["start"], self.draws) != chain["end"]:
            found.append("the chain over the draws does not end as recorded: a draw was changed")
        contents = {"tokens": json.dumps(self.tokens, separators=(",", ":"))}
        if self.text is not None:
            contents["text"] = self.text
        digests = {each["name"]: each["digest"]["sha256"] for each in self.statement["subject"]}
        for name, content in contents.items():
            if digests.get(name) != text_digest(content):
                found.append(f"the digest of the {name} is not that of what it holds")
        return found


def read_receipts(path: str | pathlib.Path, key: PublicKey | None = None) -> Iterator[Receipt]:
    """Yield the receipts of a file: one, or one a line, in envelopes or not.

    Args:
        path: the file.
        key: that each is to be signed by; None: envelopes are opened, and not verified.

    Raises:
        InputError: the file cannot be read, holds something else, or a receipt is not signed by
            the key.
    """
    for source, row in read_rows(path):
        if key is not None and (fault := key.fault(parse_envelope(row, source))) is not None:
            raise InputError(f"{source}: {fault.text}; name receipts of that key, or its key")
        yield read_statement(open_envelope(row, source), source)


def read_rows(path: str | pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yield what is in the place of each receipt of a file, and the name of the place.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        with open_regular(pathlib.Path(path)) as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; name another file") from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"{path} has more than {_MAX_BYTES:,} bytes, expected receipts; split it")
    lines = content.splitlines()
    if not content.strip():
        raise InputError(f"{path} is empty, expected receipts; name another file")
    is_one = len([line for line in lines if line.strip()]) == 1 or lines[0].strip() == b"{"
    if is_one:
        yield from _rows_of(parse_json(content, str(path)), str(path))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            source = f"{path}, line {number}"
            yield from _rows_of(parse_json(line, source), source)


def _rows_of(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    """Yield the receipts in a JSON value: itself, or those of a batch's line."""
    if not isinstance(value, dict) or "receipts" not in value:
        yield source, value
        return
    if not isinstance(rows := value["receipts"], list):
        raise InputError(f"{source}: receipts is {rows!r:.40}, expected a list")
    for number, row in enumerate(rows, start=1):
        yield source if len(rows) == 1 else f"{source}, receipt {number}", row


def read_statement(value: Any, source: str = "the receipt") -> Receipt:
    """Check the form of a receipt and return its fields.

    Raises:
        InputError: a field is missing, of another type, or out of range.
    """
    error = best_match(jsonschema.Draft202012Validator(STATEMENT).iter_errors(value))
    if error is not None:
        place = "".join(f"[{p!r}]" for p in error.absolute_path)
        raise InputError(f"{source} is no receipt: {place} {error.message[:200]}")
    definition = value["predicate"]["buildDefinition"]
    external, internal = definition["externalParameters"], definition["internalParameters"]
    is_private = external["prompt"].keys() == {"sha256"}
    tokens = internal["promptTokens"]
    if isinstance(tokens, dict) != is_private:
        raise InputError(f"{source} is no receipt: one of prompt and promptTokens is private")
    try:
        digest(value)  # what has no canonical form has no digest
        parameters = _parameters(external["parameters"])
        prompt = {} if is_private else _prompt(external["prompt"])
        draws = _draws(internal["draws"], is_private=is_private)
        text = _text(value["subject"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{source} is no receipt: {error}") from None
    environment = Environment(internal["environment"], sizes=internal["sizes"])
    return Receipt(
        statement=value,
        is_private=is_private,
        prompt=prompt,
        prompt_tokens=[] if is_private else tokens,
        parameters=parameters,
        environment=environment,
        draws=draws,
        finish_reason=internal["finishReason"],
        text=text,
    )


def _parameters(values: dict[str, Any]) -> Parameters:
    values = {name: value for name, value in values.items() if name in SCHEMAS}
    values["seed"] = int(values["seed"])
    given = {name: value for name, value in values.items() if value is not None}
    if problems := parameter_problems(given, ()):
        raise ValueError("; ".join(problems))
    return make_parameters(given)


def _prompt(fields: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(GenerationRequest)} - {
        "parameters",
        "resumed",
    }
    kinds = names & {"messages", "raw_prompt", "prompt_tokens"} & fields.keys()
    if fields.keys() - names or len(kinds) != 1:
        raise ValueError(f"the prompt has {', '.join(fields)}, expected one kind of prompt")
    return fields


def _draws(columns: dict[str, list], *, is_private: bool) -> list[Draw]:
    """Return the draws; of a private receipt none, but their numbers are checked."""
    count = len(columns["logprob"])
    off = ["inf"] * count
    texts = [columns["logprob"], *(columns.get(name, off) for name in MARGINS)]
    floats = [[from_hex(text) for text in column] for column in texts]
    if is_private:
        return []
    return [Draw(*row) for row in zip(columns["token"], *floats, strict=True)]


def _text(subjects: list[dict[str, Any]]) -> str | None:
    for each in subjects:
        if each["name"] == "text" and "content" in each:
            return base64.b64decode(each["content"], validate=True).decode()
    return None


def _dependency_problems(definition: dict[str, Any], environment: Environment) -> list[str]:
    """Return which dependencies are not those of the environment."""
    parts = environment.parts
    expected = {
        "weights": parts["weights"],
        "tokenizer.model": parts["tokenizer"],
        "config": digest(parts["config"]),
        "llama_jax": parts.get("code"),
    }
    found = {
        each.get("name"): each.get("digest", {}).get("sha256")
        for each in definition["resolvedDependencies"]
        if isinstance(each.get("digest", {}), dict)
    }
    return [
        f"the dependency {name} is not that of the environment"
        for name, sha256 in expected.items()
        if sha256 != found.get(name)
    ]
