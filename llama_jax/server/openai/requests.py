"""OpenAI's requests: one pydantic model for each route, and the generations that a body requests.

A model defines the validation, the errors and the JSON Schema of a route's own fields. The engine
checks the parameters of generation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from llama_jax.card import contract
from llama_jax.decode.sampling import TOP_LOGPROBS
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.errors import InputError
from llama_jax.server.errors import NO_MODEL, ApiError
from llama_jax.server.openai import messages
from llama_jax.server.openai.messages import ChatMessage, wrong
from llama_jax.server.openai.parameters import (
    IGNORED,
    refuse_unsupported,
    take_parameters,
)
from llama_jax.text.tokenizer import BOS_PIECE

MAX_CHOICES = 8
MAX_COMPLETION_LOGPROBS = 5

_MAX_CARD_SEED = 9_999_999_999
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1}


def _prompts(value: Any) -> list[str | list[int]]:
    """Return one prompt or several as a list; stop at the first fault, as there may be millions."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise wrong("prompt", value, "text, token ids, or a list of either")
    for i, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or _is_ids(prompt)):
            raise wrong(f"prompt[{i}]", prompt, "text or a list of token ids")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class StreamOptions(BaseModel, strict=True):
    """Options of a stream."""

    include_usage: bool | None = None


class _Request(BaseModel, strict=True):
    model: str
    stream: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_completion_tokens: int | None = Field(None, ge=0)
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds only the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


_R = TypeVar("_R", bound=_Request)


class ChatRequest(_Request):
    """A chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    allow_control_tags: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)


class CompletionRequest(_Request):
    """A completion."""

    prompt: Annotated[
        list[Any], BeforeValidator(_prompts), WithJsonSchema({"anyOf": [_TEXT, _IDS, _PROMPTS]})
    ]
    echo: bool | None = None
    add_special_tokens: bool | None = None
    parse_control: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS)


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """What a body requests."""

    requests: list[GenerationRequest]
    """One for each choice, in order: n of the first prompt, n of the next."""
    model: str
    """The name that the client calls the model by."""
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    ignored: list[str]
    """The parameters without effect."""
    warnings: list[str]
    """These, in words."""


def parse_chat(body: bytes, models: Sequence[str], max_choices: int) -> ParsedRequest:
    """Parse the body of a chat completion.

    Args:
        body: JSON.
        models: the names of the model served.
        max_choices: choices that a request may have at most.

    Raises:
        ApiError: another model, or a parameter that is wrong or not supported.
        InputError: what else is wrong, such as the order of roles.
    """
    request, parameters, ignored = _validate(ChatRequest, body, models)
    if request.top_logprobs and not request.logprobs:
        raise wrong("top_logprobs", request.top_logprobs, "logprobs to be true with it")
    n = _count(request, 1, max_choices)
    turns, unknown = messages.to_dialog(request.messages)
    generation = make_request(
        messages=turns,
        allow_control_tags=bool(request.allow_control_tags),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        **parameters,
    )
    return _parsed(request, _choices(generation, n), [*ignored, *unknown])


def parse_completion(body: bytes, models: Sequence[str], max_choices: int) -> ParsedRequest:
    """Parse the body of a completion; see `parse_chat`.

    A prompt is text or ids. BOS is put before one that does not begin with it.
    """
    request, parameters, ignored = _validate(CompletionRequest, body, models)
    scored = bool(request.echo) and request.logprobs is not None
    if scored and request.stream:
        raise InputError("echo, logprobs and stream are given together; drop one of them")
    n = _count(request, len(request.prompt), max_choices)
    if scored and parameters.get("max_tokens") == 1:
        # lm-eval scores a prompt like this and drops the last entry: EOS has to be one too.
        parameters.setdefault("ignore_eos", True)
    parameters |= {"logprobs": request.logprobs, "prompt_logprobs": scored}
    requests: list[GenerationRequest] = []
    for i, prompt in enumerate(request.prompt):
        if scored and not request.parse_control and _begins_with_bos(prompt):
            raise InputError(
                f"prompt[{i}] begins with {BOS_PIECE}, which would be scored as plain text, "
                "expected text without it (BOS is put before each prompt); remove it, or set "
                "parse_control"
            )
        requests += _choices(_continuation(request, prompt, parameters), n)
    return _parsed(request, requests, ignored, echo=bool(request.echo))


def _begins_with_bos(prompt: str | list[int]) -> bool:
    return isinstance(prompt, str) and prompt.startswith(BOS_PIECE)


def _continuation(
    request: CompletionRequest, prompt: str | list[int], parameters: dict[str, Any]
) -> GenerationRequest:
    """Return what generates the continuation of one prompt."""
    text = {"prompt": prompt, "raw": True, "parse_control": bool(request.parse_control)}
    given = text if isinstance(prompt, str) else {"prompt_tokens": prompt}
    return dataclasses.replace(
        make_request(**given, **parameters),
        add_bos=request.add_special_tokens is not False,
        continues_prompt=True,
    )


def _parsed(
    request: "ChatRequest | CompletionRequest",
    requests: list[GenerationRequest],
    ignored: Sequence[str],
    *,
    echo: bool = False,
) -> ParsedRequest:
    ignored = contract.first_names(ignored)
    return ParsedRequest(
        requests=requests,
        model=request.model,
        n=request.n or 1,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        echo=echo,
        ignored=ignored,
        warnings=[*map(warning_of, ignored)],
    )


def _validate(
    cls: type[_R], body: bytes, models: Sequence[str]
) -> tuple[_R, dict[str, Any], list[str]]:
    """Return the validated request, its parameters of generation, and what else it has.

    A null counts as absent.
    """
    payload = contract.parse_body(body)
    if not isinstance(payload, dict):
        raise InputError(f"body is {payload!r:.40}, expected an object")
    given = payload.get("model")
    if not isinstance(given, str):
        raise wrong("model", given, repr(models[0]))
    if given not in models:
        raise ApiError(NO_MODEL, given, param="model")
    try:
        request = cls.model_validate({n: _integer(payload.get(n)) for n in cls.model_fields})
    except ValidationError as error:
        raise _refusal(cls, error.errors()[0]) from None
    n = request.n or 1
    if request.best_of not in (None, n):
        raise wrong("best_of", request.best_of, f"the same as n, {n}")
    rest = _others(payload, cls)
    refuse_unsupported(rest)
    limit = request.max_completion_tokens
    if limit is not None and rest.setdefault("max_tokens", limit) != limit:
        raise wrong("max_completion_tokens", limit, "the same as max_tokens; give only one")
    options = _others(payload.get("stream_options") or {}, StreamOptions)
    parameters = take_parameters(rest)
    return request, parameters, [*(f"stream_options.{name}" for name in options), *rest]


def _integer(value: Any) -> Any:
    """Return 2.0 as 2: JSON has one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _others(given: dict[str, Any], cls: type[BaseModel]) -> dict[str, Any]:
    """Return the fields that a model does not have."""
    return {n: v for n, v in given.items() if n not in cls.model_fields and v is not None}


def _refusal(cls: type[_Request], error: ErrorDetails) -> ApiError:
    """Return pydantic's error in this server's words: what, got, expected."""
    name = str(error["loc"][-1])
    if error["loc"][0] == "messages":
        return messages.refusal(error)
    match error["type"]:
        case "bool_type":
            expected = "true or false"
        case "model_type":
            expected = "an object"
        case _:
            bounds = cls.model_json_schema()["properties"][name]["anyOf"][0]
            high = f"to {bounds['maximum']}" if "maximum" in bounds else "up"
            expected = f"an integer from {bounds['minimum']} {high}"
    return wrong(name, error["input"], expected)


def warning_of(name: str) -> str:
    """Return the warning about a field without effect."""
    if name in IGNORED:
        return f"{name} has no effect on this server: it was ignored"
    return f"{name} is not a parameter of this route: it was ignored"


def _count(request: _Request, prompts: int, most: int) -> int:
    """Return the choices of each prompt, n; refuse too many in all."""
    n = request.n or 1
    if prompts * n > most:
        raise InputError(
            f"the request asks for {prompts * n:,} answers, expected at most {most:,} (prompts "
            "times n); send several requests"
        )
    return n


def _choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """Return a request n times; choice j has the seed + j, so each can be repeated alone."""
    first = request.parameters.seed
    largest = _MAX_CARD_SEED if first <= _MAX_CARD_SEED else 2**64 - 1
    seeds = [first + j if first + j <= largest else first + j - largest for j in range(n)]
    return [
        dataclasses.replace(request, parameters=dataclasses.replace(request.parameters, seed=seed))
        for seed in seeds
    ]
