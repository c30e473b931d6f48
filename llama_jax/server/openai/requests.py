"""OpenAI's requests: a body to the generations that it asks for."""

import dataclasses
from typing import Any

from llama_jax.card import contract
from llama_jax.decode.sampling import TOP_LOGPROBS
from llama_jax.engine.parameters import SCHEMAS
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.errors import InputError
from llama_jax.server.errors import BAD_INPUT, NO_MODEL, ApiError

MAX_CHOICES = 8
MAX_COMPLETION_LOGPROBS = 5

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Parameters that would change the answer, and the values of each that would not."""


COMPLETION_PARAMETERS = SCHEMAS.keys() - {"logprobs", "prompt_logprobs"}
_MAX_CARD_SEED = 9_999_999_999


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """What a body asks for."""

    requests: list[GenerationRequest]
    """One for each choice, in order: n of the first prompt, n of the next."""
    n: int
    stream: bool
    include_usage: bool
    """Whether a stream is to end in a chunk of nothing but the usage."""
    echo: bool
    warnings: list[str]
    """What was ignored, named."""


def parse_chat(body: bytes, model: str, most: int) -> ParsedRequest:
    """Parse the body of a chat completion.

    Args:
        body: JSON.
        model: the one that is served.
        most: choices that it may ask for.

    Raises:
        ApiError: another model, or a parameter that is not supported.
        InputError: SchemaError for what the model card forbids, and what else is wrong.
    """
    payload = _payload(body, model)
    n, include_usage, warnings = _common(payload)
    _check_count(n, most)
    logprobs = _top_logprobs(payload)
    own = {name: payload.pop(name) for name in ("stop", "ignore_eos") if name in payload}
    card = contract.check(payload)
    request = make_request(**card.fields, **own, logprobs=logprobs)
    return ParsedRequest(
        requests=_choices(request, n),
        n=n,
        stream=card.stream,
        include_usage=include_usage,
        echo=False,
        warnings=warnings + [_warning(name) for name in card.ignored],
    )


def parse_completion(body: bytes, model: str, most: int) -> ParsedRequest:
    """Parse the body of a completion; see `parse_chat`. A prompt is text behind BOS, or ids."""
    payload = _payload(body, model)
    n, include_usage, warnings = _common(payload)
    stream, echo = _boolean(payload, "stream"), _boolean(payload, "echo")
    logprobs = _integer(payload, "logprobs", 0, MAX_COMPLETION_LOGPROBS)
    if stream and echo and logprobs is not None:
        raise InputError("echo, logprobs and stream are given together; drop one of them")
    prompts = _prompts(payload.pop("prompt", None))
    _check_count(len(prompts) * n, most)
    parameters = {
        name: payload.pop(name) for name in list(payload) if name in COMPLETION_PARAMETERS
    }
    scored = {"logprobs": logprobs, "prompt_logprobs": echo and logprobs is not None}
    if echo and logprobs is not None and parameters.get("max_tokens") == 1:
        # How lm-eval scores a prompt: it drops the last entry, so there is to be one, be it EOS.
        parameters.setdefault("ignore_eos", True)
    requests: list[GenerationRequest] = []
    for i, prompt in enumerate(prompts):
        request = make_request(**_prompt(i, prompt), **parameters, **scored)
        requests += _choices(request, n)
    return ParsedRequest(
        requests=requests,
        n=n,
        stream=stream,
        include_usage=include_usage,
        echo=echo,
        warnings=warnings + [_warning(name) for name in contract.first_names(list(payload))],
    )


def _payload(body: bytes, model: str) -> dict[str, Any]:
    """Return what a body gives; a null is as good as nothing."""
    payload = contract.parse_body(body)
    if not isinstance(payload, dict):
        raise InputError(f"body is {payload!r:.40}, expected an object")
    payload = {name: value for name, value in payload.items() if value is not None}
    given = payload.pop("model", None)
    if not isinstance(given, str):
        raise _wrong("model", given, f"{model!r}")
    if given != model:
        raise ApiError(NO_MODEL, given, param="model")
    return payload


def _common(payload: dict[str, Any]) -> tuple[int, bool, list[str]]:
    """Take out what both routes share; return n, include_usage and warnings."""
    n = _integer(payload, "n", 1, MAX_CHOICES) or 1
    best_of = _integer(payload, "best_of", 1, MAX_CHOICES) or n
    if best_of != n:
        raise _wrong("best_of", best_of, f"the same as n, {n}")
    for name, harmless in UNSUPPORTED.items():
        if name in payload and not _is_one_of(payload.pop(name), harmless):
            raise ApiError(BAD_INPUT, f"{name} is not supported, leave it out", param=name)
    if "max_completion_tokens" in payload:
        most = payload.pop("max_completion_tokens")
        if not _is_one_of(payload.setdefault("max_tokens", most), (most,)):
            raise _wrong("max_completion_tokens", most, "the same as max_tokens; give only one")
    options = payload.pop("stream_options", {})
    if not isinstance(options, dict):
        raise _wrong("stream_options", options, "an object")
    options = {name: value for name, value in options.items() if value is not None}
    include_usage = _boolean(options, "include_usage")
    return n, include_usage, [_warning(f"stream_options.{name}") for name in options]


def _top_logprobs(payload: dict[str, Any]) -> int | None:
    """Return how many likeliest tokens to tell, or None to tell no probabilities at all."""
    wanted = _boolean(payload, "logprobs")
    top = _integer(payload, "top_logprobs", 0, TOP_LOGPROBS)
    if top and not wanted:
        raise _wrong("top_logprobs", top, "logprobs to be true with it")
    return (top or 0) if wanted else None


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise InputError(
            f"the request asks for {count:,} answers, expected at most {most:,} (prompts times "
            "n); send several requests"
        )


def _choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """Return a request n times, choice j with the seed + j: each can be had again alone."""
    first = request.parameters.seed
    largest = _MAX_CARD_SEED if first <= _MAX_CARD_SEED else 2**64 - 1
    seeds = [first + j if first + j <= largest else first + j - largest for j in range(n)]
    return [
        dataclasses.replace(request, parameters=dataclasses.replace(request.parameters, seed=seed))
        for seed in seeds
    ]


def _prompts(prompt: Any) -> list[Any]:
    """Return a prompt, or several, as a list."""
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _wrong("prompt", prompt, "text, token ids, or a list of either")
    return prompt


def _prompt(i: int, prompt: Any) -> dict[str, Any]:
    """Return one of them in the terms of `make_request`."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "raw": True}
    if _is_ids(prompt):
        return {"prompt_tokens": prompt}
    raise _wrong(f"prompt[{i}]", prompt, "text or a list of token ids")


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Compare as JSON does, where false is not 0."""
    return any(
        value == other and (type(value) is bool) == (type(other) is bool) for other in others
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _integer(values: dict[str, Any], name: str, low: int, high: int) -> int | None:
    """Take out a whole number, if it is there."""
    value = values.pop(name, None)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    if value is not None and not (whole and low <= value <= high):
        raise _wrong(name, value, f"an integer from {low} to {high}")
    return None if value is None else int(value)


def _boolean(values: dict[str, Any], name: str) -> bool:
    """Take out a boolean; absent is false."""
    value = values.pop(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _wrong(name: str, value: Any, expected: str) -> ApiError:
    return ApiError(BAD_INPUT, f"{name} is {value!r:.40}, expected {expected}", param=name)


def _warning(name: str) -> str:
    return f"{name} is not a parameter of this route: it was ignored"
