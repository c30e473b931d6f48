"""OpenAI's requests: one pydantic model for each route, and the generations that a body requests.

A model defines the validation, the errors and the JSON Schema of a route's own fields. The messages
of a chat and its parameters of generation are checked by the model card's schema, the parameters of
a completion by the engine.
"""

import dataclasses
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

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
"""Parameters that would change the answer, each with the values that would not."""

COMPLETION_PARAMETERS = SCHEMAS.keys() - {"logprobs", "prompt_logprobs"}
_MAX_CARD_SEED = 9_999_999_999
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1}


def _prompts(value: Any) -> list[str | list[int]]:
    """Return one prompt or several as a list; stop at the first fault, as there may be millions."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise _wrong("prompt", value, "text, token ids, or a list of either")
    for i, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or _is_ids(prompt)):
            raise _wrong(f"prompt[{i}]", prompt, "text or a list of token ids")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class StreamOptions(BaseModel, strict=True):
    """Options of a stream."""

    include_usage: bool | None = None


class _Request(BaseModel, strict=True):
    model: str
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

    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)


class CompletionRequest(_Request):
    """A completion."""

    prompt: Annotated[
        list[Any], BeforeValidator(_prompts), WithJsonSchema({"anyOf": [_TEXT, _IDS, _PROMPTS]})
    ]
    echo: bool | None = None
    stream: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS)


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """What a body requests."""

    requests: list[GenerationRequest]
    """One for each choice, in order: n of the first prompt, n of the next."""
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    warnings: list[str]
    """Names what was ignored."""


def parse_chat(body: bytes, model: str, max_choices: int) -> ParsedRequest:
    """Parse the body of a chat completion.

    Args:
        body: JSON.
        model: the name of the model served.
        max_choices: choices that a request may have at most.

    Raises:
        ApiError: another model, or a parameter that is wrong or not supported.
        InputError: SchemaError for what the model card forbids, and what else is wrong.
    """
    request, rest, warnings = _validate(ChatRequest, body, model)
    if request.top_logprobs and not request.logprobs:
        raise _wrong("top_logprobs", request.top_logprobs, "logprobs to be true with it")
    n = _count(request, 1, max_choices)
    own = {name: rest.pop(name) for name in ("stop", "ignore_eos") if name in rest}
    card = contract.check(rest)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    generation = make_request(**card.fields, **own, logprobs=logprobs)
    return ParsedRequest(
        requests=_choices(generation, n),
        n=n,
        stream=card.stream,
        include_usage=request.include_usage,
        echo=False,
        warnings=warnings + [_warning(name) for name in card.ignored],
    )


def parse_completion(body: bytes, model: str, max_choices: int) -> ParsedRequest:
    """Parse the body of a completion; see `parse_chat`. A prompt is text after BOS, or ids."""
    request, rest, warnings = _validate(CompletionRequest, body, model)
    scored = bool(request.echo) and request.logprobs is not None
    if scored and request.stream:
        raise InputError("echo, logprobs and stream are given together; drop one of them")
    n = _count(request, len(request.prompt), max_choices)
    parameters = {name: rest.pop(name) for name in list(rest) if name in COMPLETION_PARAMETERS}
    if scored and parameters.get("max_tokens") == 1:
        # lm-eval scores a prompt like this and drops the last entry: EOS has to be one too.
        parameters.setdefault("ignore_eos", True)
    parameters |= {"logprobs": request.logprobs, "prompt_logprobs": scored}
    requests: list[GenerationRequest] = []
    for prompt in request.prompt:
        text = {"prompt": prompt, "raw": True} if isinstance(prompt, str) else {}
        requests += _choices(make_request(**(text or {"prompt_tokens": prompt}), **parameters), n)
    return ParsedRequest(
        requests=requests,
        n=n,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        echo=bool(request.echo),
        warnings=warnings + [_warning(name) for name in contract.first_names(list(rest))],
    )


def _validate(cls: type[_R], body: bytes, model: str) -> tuple[_R, dict[str, Any], list[str]]:
    """Return the validated request, the other fields that are given, and warnings.

    A null counts as absent.
    """
    payload = contract.parse_body(body)
    if not isinstance(payload, dict):
        raise InputError(f"body is {payload!r:.40}, expected an object")
    given = payload.get("model")
    if not isinstance(given, str):
        raise _wrong("model", given, repr(model))
    if given != model:
        raise ApiError(NO_MODEL, given, param="model")
    try:
        request = cls.model_validate({n: _integer(payload.get(n)) for n in cls.model_fields})
    except ValidationError as error:
        raise _refusal(cls, error.errors()[0]) from None
    n = request.n or 1
    if request.best_of not in (None, n):
        raise _wrong("best_of", request.best_of, f"the same as n, {n}")
    rest = _others(payload, cls)
    for name, harmless in UNSUPPORTED.items():
        if name in rest and not _is_one_of(rest.pop(name), harmless):
            raise ApiError(BAD_INPUT, f"{name} is not supported, leave it out", param=name)
    limit = request.max_completion_tokens
    if limit is not None and rest.setdefault("max_tokens", limit) != limit:
        raise _wrong("max_completion_tokens", limit, "the same as max_tokens; give only one")
    options = _others(payload.get("stream_options") or {}, StreamOptions)
    return request, rest, [_warning(f"stream_options.{name}") for name in options]


def _integer(value: Any) -> Any:
    """Return 2.0 as 2: JSON has one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Compare as JSON does, where false is not 0."""
    return any(
        value == other and (type(value) is bool) == (type(other) is bool) for other in others
    )


def _others(given: dict[str, Any], cls: type[BaseModel]) -> dict[str, Any]:
    """Return the fields that a model does not have."""
    return {n: v for n, v in given.items() if n not in cls.model_fields and v is not None}


def _refusal(cls: type[_Request], error: ErrorDetails) -> ApiError:
    """Return pydantic's error in this server's words: what, got, expected."""
    name = str(error["loc"][-1])
    match error["type"]:
        case "bool_type":
            expected = "true or false"
        case "model_type":
            expected = "an object"
        case _:
            bounds = cls.model_json_schema()["properties"][name]["anyOf"][0]
            high = f"to {bounds['maximum']}" if "maximum" in bounds else "up"
            expected = f"an integer from {bounds['minimum']} {high}"
    return _wrong(name, error["input"], expected)


def _wrong(name: str, value: Any, expected: str) -> ApiError:
    return ApiError(BAD_INPUT, f"{name} is {value!r:.40}, expected {expected}", param=name)


def _warning(name: str) -> str:
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
