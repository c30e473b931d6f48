"""The types of OpenAI's files and batches: what a client sends, and what it gets."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from llama_jax.server.types import Count

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16),
]
_Time = Count | None


class ExpiresAfter(BaseModel):
    """How long a file is kept."""

    model_config = ConfigDict(strict=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchRequest(BaseModel):
    """A batch to create."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    """Decides the seeds of the lines that have none; one is drawn if it is missing."""


class FileObject(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: Count
    expires_at: _Time
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileDeleted(TypedDict):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class _Page(TypedDict):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(_Page):
    """A page of files."""

    data: list[FileObject]


class BatchProblem(TypedDict):
    """What is wrong with a batch's input."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchProblems(TypedDict):
    """All of that."""

    object: Literal["list"]
    data: list[BatchProblem]


class RequestCounts(TypedDict):
    """Lines of a batch."""

    total: Count
    completed: Count
    failed: Count


class InputDetails(TypedDict):
    """Tokens of the prompts, by where they came from."""

    cached_tokens: Count


class OutputDetails(TypedDict):
    """Tokens of the answers, by their kind."""

    reasoning_tokens: Count


class BatchUsage(TypedDict):
    """Tokens counted so far."""

    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count


class BatchObject(TypedDict):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    model: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: Count
    in_progress_at: _Time
    expires_at: _Time
    finalizing_at: _Time
    completed_at: _Time
    failed_at: _Time
    expired_at: _Time
    cancelling_at: _Time
    cancelled_at: _Time
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, Any] | None
    seed: Count


class BatchList(_Page):
    """A page of batches."""

    data: list[BatchObject]
