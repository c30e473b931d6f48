"""The types of Workers AI's responses and of errors. They give the JSON Schemas of the OpenAPI
document.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from llama_jax.engine.result import FinishReason

Count = Annotated[int, Field(ge=0)]
Empty = Annotated[list[Any], Field(max_length=0)]
Finished = Annotated[FinishReason, WithJsonSchema({"enum": ["stop", "length"]})]
"""A cancelled generation has no response."""


class Usage(TypedDict):
    """Tokens counted."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class Note(TypedDict):
    """A code and a text, as Cloudflare's API returns them."""

    code: int
    message: str


class Metadata(TypedDict):
    """What is known of a generation beside its text."""

    usage: Usage
    finish_reason: Finished
    seed: Count
    fingerprint: str
    receipt: NotRequired[dict[str, Any]]
    """If it was asked for."""


class RunResult(Metadata):
    """A generation."""

    response: str | None
    tool_calls: Empty


class QueueRequest(TypedDict):
    """Requests to be answered later, or the name of some that were queued."""

    requests: NotRequired[Annotated[list[Any], Field(min_length=1)]]
    request_id: NotRequired[str]


class QueuedResult(TypedDict):
    """Requests whose answers are not all there."""

    status: Literal["queued", "running"]
    request_id: str
    model: str


class QueuedAnswer(TypedDict):
    """The answer to one of several requests."""

    id: Count
    """Its place among them, from 0."""
    result: dict[str, Any]
    success: bool
    external_reference: Any
    warnings: NotRequired[list[str]]
    errors: NotRequired[list[Note]]


class QueueResult(TypedDict):
    """The answers to all of them."""

    responses: list[QueuedAnswer]
    usage: Usage


class TaskEntry(TypedDict):
    """A kind of model."""

    id: str
    name: str
    description: str


class ModelProperty(TypedDict):
    """A property of a model."""

    property_id: str
    value: str


class ModelEntry(TypedDict):
    """A model in the results of a search."""

    id: str
    source: int
    name: str
    description: str
    task: TaskEntry
    created_at: str
    tags: list[str]
    properties: list[ModelProperty]


class ResultInfo(TypedDict):
    """The page of a search."""

    count: Count
    page: Count
    per_page: Count
    total_count: Count
    total_pages: Count


class CardSchemas(TypedDict):
    """The model card's two schemas."""

    input: dict[str, Any]
    output: dict[str, Any]


class _Envelope(TypedDict):
    success: Literal[True]
    errors: Empty
    messages: list[Note]


class RunResponse(_Envelope):
    """A generation in Cloudflare's envelope."""

    result: RunResult


class QueueResponse(_Envelope):
    """Requests that wait, or their answers, in Cloudflare's envelope."""

    result: QueuedResult | QueueResult


class SearchResponse(_Envelope):
    """Models in Cloudflare's envelope."""

    result: list[ModelEntry]
    result_info: ResultInfo


class SchemaResponse(_Envelope):
    """The model card's schemas in Cloudflare's envelope."""

    result: CardSchemas


class ErrorNote(Note):
    """What went wrong."""

    error_chain: NotRequired[list[Note]]


class OpenAIError(TypedDict):
    """The same in OpenAI's form, for its clients."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """An error: Cloudflare's envelope, and beside it OpenAI's object."""

    errors: Annotated[list[ErrorNote], Field(min_length=1, max_length=1)]
    success: Literal[False]
    result: Annotated[dict[str, Any], Field(max_length=0)] | None
    messages: Empty
    error: OpenAIError
