"""Routes of the tokenizer, in vLLM's form: text to token ids, ids to text, and what it is."""

from collections.abc import Callable
from typing import Annotated, NotRequired, TypeVar

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from llama_jax.card import contract
from llama_jax.engine.request import check_tokens
from llama_jax.errors import InputError
from llama_jax.server.compact_json import CompactJSONResponse
from llama_jax.server.in_thread import in_thread
from llama_jax.server.openai.messages import ChatMessage, to_dialog, wrong
from llama_jax.server.openai.messages import refusal as messages_refusal
from llama_jax.server.openai.requests import warning_of
from llama_jax.server.service import Service
from llama_jax.server.types import Count
from llama_jax.server.workers_ai import check_model, service_of
from llama_jax.text.chat import CHAT_TEMPLATE, encode_dialog
from llama_jax.text.tokenizer import BOS_ID, Tokenizer, transformers_config

_EXPECTED = {"bool_type": "true or false", "string_type": "a string"}


class TokenizeRequest(BaseModel, strict=True):
    """Text, or a dialog, to encode."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    parse_control: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel, strict=True):
    """Token ids to decode."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class TokenizeResponse(TypedDict):
    """Token ids."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None
    warnings: NotRequired[list[str]]


class DetokenizeResponse(TypedDict):
    """Text."""

    prompt: str
    warnings: NotRequired[list[str]]


class TokenizerInfo(TypedDict):
    """The tokenizer's properties, by the names of transformers' tokenizer_config.json."""

    tokenizer_class: str
    bos_token: str
    eos_token: str
    unk_token: str
    add_bos_token: bool
    add_eos_token: bool
    model_max_length: Count
    chat_template: str


_R = TypeVar("_R", TokenizeRequest, DetokenizeRequest)


async def tokenize(request: Request) -> Response:
    """POST .../tokenize: encode text or a dialog."""
    return await _answer(request, _tokenize)


async def detokenize(request: Request) -> Response:
    """POST .../detokenize: decode token ids; BOS and EOS are `<s>` and `</s>`."""
    return await _answer(request, _detokenize)


async def tokenizer_info(request: Request) -> Response:
    """GET .../tokenizer_info: special tokens and chat template."""
    service = service_of(request)
    _tokenizer_of(service)
    info = transformers_config(service.llm.context) | {"chat_template": CHAT_TEMPLATE}
    return CompactJSONResponse(info)


async def _answer(request: Request, respond: Callable[[Service, bytes], object]) -> Response:
    """Respond from a thread, as a body may have megabytes."""
    body = await request.body()
    return CompactJSONResponse(await in_thread(respond, service_of(request), body))


def _tokenize(service: Service, body: bytes) -> TokenizeResponse:
    request, ignored = _parse(TokenizeRequest, body, service)
    if (request.prompt is None) == (request.messages is None):
        raise InputError("a request has either prompt or messages, expected one of them")
    tokenizer = _tokenizer_of(service)
    if request.messages is not None:
        turns, unknown = to_dialog(request.messages)
        tokens, ignored = encode_dialog(turns, tokenizer), [*ignored, *unknown]
    else:
        text = request.prompt or ""
        parsed = request.parse_control is not False
        tokens = tokenizer.encode_with_control(text) if parsed else tokenizer.encode(text)
        if request.add_special_tokens is not False and tokens[:1] != [BOS_ID]:
            tokens = [BOS_ID, *tokens]
    response: TokenizeResponse = {
        "count": len(tokens),
        "max_model_len": service.llm.context,
        "tokens": tokens,
        "token_strs": list(map(tokenizer.piece, tokens)) if request.return_token_strs else None,
    }
    if ignored:
        response["warnings"] = list(map(warning_of, contract.first_names(ignored)))
    return response


def _detokenize(service: Service, body: bytes) -> DetokenizeResponse:
    request, ignored = _parse(DetokenizeRequest, body, service)
    tokenizer, vocab_size = _tokenizer_of(service), service.llm.config.vocab_size
    tokens = check_tokens(request.tokens, vocab_size, "tokens") if request.tokens else []
    response: DetokenizeResponse = {"prompt": tokenizer.decode_with_control(tokens)}
    if ignored:
        response["warnings"] = list(map(warning_of, contract.first_names(ignored)))
    return response


def _parse(cls: type[_R], body: bytes, service: Service) -> tuple[_R, list[str]]:
    """Return a validated request, and the names of the fields without effect."""
    payload = contract.parse_body(body)
    if not isinstance(payload, dict):
        raise InputError(f"body is {payload!r:.40}, expected an object")
    given = {name: value for name, value in payload.items() if value is not None}
    try:
        request = cls.model_validate({n: v for n, v in given.items() if n in cls.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name, *_ = first["loc"]
        if name == "messages":
            raise messages_refusal(first) from None
        expected = "a list of token ids" if name == "tokens" else _EXPECTED[first["type"]]
        raise wrong(str(name), given.get(str(name)), expected) from None
    if request.model is not None:
        check_model(service, request.model)
    return request, [name for name in given if name not in cls.model_fields]


def _tokenizer_of(service: Service) -> Tokenizer:
    """Return the tokenizer; refuse if the checkpoint has none."""
    if service.llm.tokenizer is None:
        raise InputError(
            "the checkpoint has no tokenizer.model; add it with `python -m convert tokenizer`"
        )
    return service.llm.tokenizer
