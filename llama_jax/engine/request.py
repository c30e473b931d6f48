"""GenerationRequest: what is asked for, checked, with every default made explicit."""

import dataclasses
import difflib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import jsonschema

from llama_jax.decode.sampling import TOP_LOGPROBS
from llama_jax.errors import InputError, one_line
from llama_jax.text.chat import Message, check_dialog, encode_dialog
from llama_jax.text.tokenizer import BOS_ID, Tokenizer

PARAMETERS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": "integer", "minimum": 0, "default": 256},
    "temperature": {"type": "number", "minimum": 0, "maximum": 5, "default": 0.6},
    "top_p": {"type": "number", "minimum": 0, "maximum": 2},
    "top_k": {"type": "integer", "minimum": 1, "maximum": 50},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "repetition_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0},
    "frequency_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.0},
    "presence_penalty": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.0},
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
"""The model card's input schema, as JSON Schema: types, ranges and defaults. Beyond the card: seed
goes down to 0 and up to 64 bits, max_tokens has a floor, what comes after the penalties is ours,
and the defaults that the card leaves out are written down (temperature 0.6 is Meta's; penalties are
off)."""

_ARGUMENTS = ("prompt", "messages", "prompt_tokens", "system", "raw", *PARAMETERS)
_MAX_DRAWN_SEED = 9_999_999_999  # the card's largest: a drawn seed can be sent anywhere


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One generation: one of three prompts, and the parameters; see `make_request`."""

    messages: tuple[Message, ...] | None
    raw_prompt: str | None
    prompt_tokens: tuple[int, ...] | None
    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: bool

    def parameters(self) -> dict[str, Any]:
        """Return the effective parameters: send them again and the same text comes back."""
        values = {name: getattr(self, name) for name in PARAMETERS}
        return {"raw": self.raw_prompt is not None} | values | {"stop": list(self.stop)}

    def encode(self, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
        """Return the prompt's token ids: Meta's dialog format, or BOS and the raw text.

        Raises:
            InputError: text without a tokenizer, or ids outside the vocabulary.
        """
        if self.prompt_tokens is not None:
            return check_tokens(self.prompt_tokens, vocab_size)
        if tokenizer is None:
            raise InputError(
                "the checkpoint has no tokenizer.model, so text cannot be encoded; give "
                "prompt_tokens, or convert again from a folder that holds tokenizer.model"
            )
        if self.messages is not None:
            return encode_dialog(self.messages, tokenizer)
        assert self.raw_prompt is not None
        return [BOS_ID, *tokenizer.encode(self.raw_prompt)]


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
        prompt: the user's text: one user turn. Exactly one of prompt, messages, prompt_tokens is
            given.
        messages: a dialog; see `chat.encode_dialog`.
        prompt_tokens: ids used as they are (no BOS is added).
        system: a system prompt, with `prompt` alone.
        raw: use the prompt as it is, behind BOS, without the chat template.
        **parameters: those of PARAMETERS; None stands for the default. A seed is drawn if none
            is given. `stop` may be one string. `logprobs` is how many of the likeliest tokens to
            tell with each drawn one's own probability; `prompt_logprobs`: for the prompt's too.

    Raises:
        InputError: naming everything that is wrong, the messages' order included.
    """
    prompt_tokens = _plain(prompt_tokens)
    if isinstance(parameters.get("stop"), str):
        parameters["stop"] = [parameters["stop"]]
    values = {name: _plain(value) for name, value in parameters.items() if value is not None}
    problems = _prompt_problems(prompt, messages, prompt_tokens, system, raw)
    problems += _parameter_problems(values)
    if problems:
        raise InputError(one_line(problems))
    if prompt is not None and not raw:
        messages = [Message(role="user", content=prompt)]
        if system is not None:
            messages.insert(0, Message(role="system", content=system))
    if messages is not None:
        check_dialog(messages)
    return GenerationRequest(
        raw_prompt=prompt if raw else None,
        messages=None if messages is None else tuple(messages),
        prompt_tokens=None if prompt_tokens is None else tuple(prompt_tokens),
        **_with_defaults(values),
    )


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return every parameter in its type; draw the seed if there is none."""
    kinds = {"integer": int, "number": float, "boolean": bool, "array": tuple}
    values = {name: values.get(name, s.get("default")) for name, s in PARAMETERS.items()}
    if values["seed"] is None:
        values["seed"] = 1 + secrets.randbelow(_MAX_DRAWN_SEED)
    return {
        name: None if value is None else kinds[PARAMETERS[name]["type"]](value)
        for name, value in values.items()
    }


def check_tokens(tokens: Any, vocab_size: int, name: str = "prompt_tokens") -> list[int]:
    """Return token ids as a list of int; refuse none at all, and ids outside the vocabulary."""
    tokens = _plain(tokens)
    if not len(tokens):
        raise InputError(f"{name} is empty, expected at least 1 token id")
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(
                f"{name}[{i}] is {token!r}, expected a token id from 0 to {vocab_size - 1}"
            )
    return list(tokens)


def _plain(value: Any) -> Any:
    """Turn NumPy's and JAX's arrays and scalars into Python's lists and numbers."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _prompt_problems(prompt: Any, messages: Any, tokens: Any, system: Any, raw: Any) -> list[str]:
    forms = {"prompt": prompt, "messages": messages, "prompt_tokens": tokens}
    given = [name for name, value in forms.items() if value is not None]
    problems = []
    if not given:
        problems.append("no prompt given, expected one of prompt, messages and prompt_tokens")
    if len(given) > 1:
        problems.append(
            f"{', '.join(given)} are given together, expected one of them; drop the others"
        )
    if prompt is not None and not isinstance(prompt, str):
        problems.append(f"prompt is {prompt!r:.40}, expected a string")
    elif prompt is not None and not prompt:
        problems.append("prompt is empty, expected at least 1 character")
    for name in ("messages", "prompt_tokens"):
        value = forms[name]
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            problems.append(f"{name} is {value!r:.40}, expected a list")
        elif name == "prompt_tokens" and value is not None and not len(value):
            problems.append("prompt_tokens is empty, expected at least 1 token id")
    if system is not None and not isinstance(system, str):
        problems.append(f"system is {system!r:.40}, expected a string")
    if system is not None and (prompt is None or raw):
        other = "raw" if raw else given[0] if given else "no prompt"
        problems.append(
            f"system is given with {other}, expected it with a prompt in the chat format; "
            "put it into the messages or the raw text"
        )
    if not isinstance(raw, bool):
        problems.append(f"raw is {raw!r:.40}, expected true or false")
    elif raw and prompt is None and given:
        problems.append(f"raw is given with {given[0]}, expected it with prompt; leave it out")
    return problems


def _parameter_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    for name, value in values.items():
        schema = PARAMETERS.get(name)
        if schema is None:
            close = difflib.get_close_matches(name, _ARGUMENTS, n=1)
            meant = f"did you mean {close[0]}?" if close else f"expected {', '.join(_ARGUMENTS)}"
            problems.append(f"unknown parameter {name!r}, {meant}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} is {value}, expected a finite number")
        elif not jsonschema.Draft202012Validator(schema).is_valid(value):
            problems.append(f"{name} is {value!r:.40}, expected {_expected(schema)}")
    return problems


def _expected(schema: dict[str, Any]) -> str:
    """Say in words what a parameter's schema allows."""
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
