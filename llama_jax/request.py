"""GenerationRequest: what is asked for, checked, with every default made explicit."""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any

import jsonschema

from llama_jax.chat import Message, encode_dialog
from llama_jax.errors import InputError, one_line
from llama_jax.tokenizer import BOS_ID, Tokenizer

PARAMETERS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": "integer", "minimum": 0, "default": 256},
    "temperature": {"type": "number", "minimum": 0, "maximum": 5, "default": 0.6},
    "top_p": {"type": "number", "minimum": 0, "maximum": 2},
    "top_k": {"type": "integer", "minimum": 1, "maximum": 50},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "repetition_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0},
    "frequency_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.0},
    "presence_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.0},
    "ignore_eos": {"type": "boolean", "default": False},
}
"""The model card's input schema, as JSON Schema: types, ranges and defaults. Beyond the card: seed
goes down to 0 and up to 64 bits, max_tokens has a floor, `ignore_eos` is ours, and the defaults
that the card leaves out are written down (temperature 0.6 is Meta's; penalties are off)."""

_MAX_DRAWN_SEED = 9_999_999_999  # the card's largest: a drawn seed can be sent anywhere


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One generation: a prompt in one of three forms, and the parameters; see `make_request`."""

    prompt: str | None
    messages: tuple[Message, ...] | None
    prompt_tokens: tuple[int, ...] | None
    raw: bool
    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    ignore_eos: bool

    def parameters(self) -> dict[str, Any]:
        """Return the effective parameters: send them again and the same text comes back."""
        return {name: getattr(self, name) for name in ("raw", *PARAMETERS)}

    def encode(self, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
        """Return the prompt's token ids.

        A prompt is one user turn of Meta's dialog format; with `raw`, BOS and the text as it is.

        Raises:
            InputError: text without a tokenizer, ids outside the vocabulary, or messages that the
                dialog format cannot express.
        """
        if self.prompt_tokens is not None:
            check_tokens(self.prompt_tokens, vocab_size)
            return list(self.prompt_tokens)
        if tokenizer is None:
            raise InputError(
                "the checkpoint has no tokenizer.model, so text cannot be encoded; give "
                "prompt_tokens, or convert again from a folder that holds tokenizer.model"
            )
        if self.messages is not None:
            return encode_dialog(self.messages, tokenizer)
        assert self.prompt is not None
        if self.raw:
            return [BOS_ID, *tokenizer.encode(self.prompt)]
        return encode_dialog([Message(role="user", content=self.prompt)], tokenizer)


def make_request(
    *,
    prompt: str | None = None,
    messages: Sequence[Message] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    system: str | None = None,
    raw: bool = False,
    **parameters: Any,
) -> GenerationRequest:
    """Check a request and fill in its defaults.

    Args:
        prompt: the user's text. Exactly one of prompt, messages, prompt_tokens is given.
        messages: a dialog; see `chat.encode_dialog`.
        prompt_tokens: ids used as they are (no BOS is added).
        system: a system prompt, with `prompt` alone.
        raw: use the prompt as it is, behind BOS, without the chat template.
        **parameters: those of PARAMETERS; None stands for the default. A seed is drawn if none
            is given.

    Raises:
        InputError: naming everything that is wrong.
    """
    problems = _prompt_problems(prompt, messages, prompt_tokens, system, raw)
    values = {name: value for name, value in parameters.items() if value is not None}
    problems += _parameter_problems(values)
    if problems:
        raise InputError(one_line(problems))
    for name, schema in PARAMETERS.items():
        values.setdefault(name, schema.get("default"))
        if values[name] is not None:
            kind = {"integer": int, "number": float, "boolean": bool}[schema["type"]]
            values[name] = kind(values[name])
    if values["seed"] is None:
        values["seed"] = 1 + secrets.randbelow(_MAX_DRAWN_SEED)
    if system is not None:
        assert prompt is not None
        messages = [
            Message(role="system", content=system),
            Message(role="user", content=prompt),
        ]
        prompt = None
    return GenerationRequest(
        prompt=prompt,
        messages=None if messages is None else tuple(messages),
        prompt_tokens=None if prompt_tokens is None else tuple(prompt_tokens),
        raw=raw,
        **values,
    )


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that are no integers of the vocabulary, or none at all."""
    if not len(tokens):
        raise InputError("prompt_tokens is empty, expected at least 1 token id")
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(
                f"prompt_tokens[{i}] is {token!r}, expected a token id from 0 to {vocab_size - 1}"
            )


def _prompt_problems(prompt: Any, messages: Any, tokens: Any, system: Any, raw: bool) -> list[str]:
    forms = {"prompt": prompt, "messages": messages, "prompt_tokens": tokens}
    given = [name for name, value in forms.items() if value is not None]
    problems = []
    if len(given) != 1:
        got = "none of them" if not given else "both " + " and ".join(given)
        problems.append(f"got {got}, expected exactly one of prompt, messages and prompt_tokens")
    if prompt is not None and not isinstance(prompt, str):
        problems.append(f"prompt is {prompt!r:.40}, expected a string")
    elif prompt is not None and not prompt:
        problems.append("prompt is empty, expected at least 1 character")
    for name in ("messages", "prompt_tokens"):
        value = forms[name]
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            problems.append(f"{name} is {value!r:.40}, expected a list")
    if system is not None and (prompt is None or raw):
        other = "raw" if raw else given[0] if given else "no prompt"
        problems.append(
            f"system is given with {other}, expected it with a prompt in the chat format; "
            "put it into the messages or the raw text"
        )
    if raw and prompt is None and given:
        problems.append(f"raw is given with {given[0]}, expected it with prompt; leave it out")
    return problems


def _parameter_problems(values: dict[str, Any]) -> list[str]:
    problems = [
        f"unknown parameter {name!r}, expected one of {', '.join(PARAMETERS)}"
        for name in values.keys() - PARAMETERS.keys()
    ]
    for name, schema in PARAMETERS.items():
        value = values.get(name)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} is {value}, expected a finite number")
            continue
        for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
            if name in values:
                problems.append(f"{name} is {value!r:.40}, expected {_expected(error, schema)}")
                break
    return problems


def _expected(error: jsonschema.ValidationError, schema: dict[str, Any]) -> str:
    kind = {"integer": "an integer", "number": "a number", "boolean": "true or false"}
    expected = kind[schema["type"]]
    if "minimum" in schema:
        expected += f" from {schema['minimum']}"
    if "maximum" in schema:
        expected += f" to {schema['maximum']}"
    elif "minimum" in schema:
        expected += " up"
    return expected
