"""The types of OpenAI's responses. They give the JSON Schemas of the OpenAPI document."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from llama_jax.server.types import Count, Finished, Usage


class TopLogprob(TypedDict):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None


class ChatLogprob(TopLogprob):
    """A token that was generated."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The log-probabilities of a chat completion's choice."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """The log-probabilities of a completion's choice; an item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class ChatMessage(TypedDict):
    """The assistant's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """A choice of a chat completion."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finished
    stop_reason: None
    seed: Count


class CompletionChoice(TypedDict):
    """A choice of a completion."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finished
    seed: Count


class PromptTokensDetails(TypedDict):
    """Tokens of the prompts, by where they came from."""

    cached_tokens: Count


class CompletionUsage(Usage):
    """Tokens counted: each prompt's once, each choice's."""

    prompt_tokens_details: PromptTokensDetails


class _Response(TypedDict):
    id: str
    created: Count
    model: str
    usage: CompletionUsage
    system_fingerprint: str
    warnings: NotRequired[list[str]]


class ChatResponse(_Response):
    """A chat completion."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]


class CompletionResponse(_Response):
    """A completion."""

    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]


class Model(TypedDict):
    """A model, and what it runs as."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count
    checkpoint: str | None
    """The name of its folder."""
    is_demo: bool
    """Whether its weights are the embedded demo model's."""
    dtype: str
    quantization: str | None
    """What is to be said of quantized weights."""
    devices: Count
    device: str
    """The kind of each."""


class ModelList(TypedDict):
    """The models served."""

    object: Literal["list"]
    data: list[Model]
