"""The messages of a chat in OpenAI's form, and the turns of Llama 2's dialog that they are."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import ErrorDetails

from llama_jax.server.errors import BAD_INPUT, UNSUPPORTED, ApiError
from llama_jax.text.chat import Message


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(_Object):
    """A part of a message's text."""

    type: Literal["text"]
    text: str


class RefusalPart(_Object):
    """A part of an assistant's message in which it refused."""

    type: Literal["refusal"]
    refusal: str


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "parts"


_Text = Annotated[str, Tag("text")]
_TextParts = Annotated[list[TextPart], Tag("parts")]
_AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
_AssistantParts = Annotated[list[_AssistantPart], Tag("parts")]
_Content = Annotated[_Text | _TextParts, Discriminator(_kind)]
_AssistantContent = Annotated[_Text | _AssistantParts, Discriminator(_kind)]


class SystemMessage(_Object):
    """The system prompt."""

    role: Literal["system", "developer"]
    content: _Content


class UserMessage(_Object):
    """A user's turn."""

    role: Literal["user"]
    content: _Content


class AssistantMessage(_Object):
    """An answer, as a response has it."""

    role: Literal["assistant"]
    content: _AssistantContent | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def to_dialog(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[str]]:
    """Return the turns of a chat, and the names of the fields that are ignored.

    The text of several parts is joined without a separator. A developer's message is a system
    message.

    Raises:
        ApiError: an assistant's message has neither content nor a refusal.
    """
    turns, ignored = [], []
    for i, message in enumerate(messages):
        content, name = message.content, f"messages[{i}]"
        if isinstance(message, AssistantMessage) and message.refusal:
            ignored += [f"{name}.refusal"] if content is not None else []
            content = message.refusal if content is None else content
        if content is None:
            raise wrong(f"{name}.content", None, "text or a list of text parts")
        ignored += _unknown(name, message)
        if not isinstance(content, str):
            for j, part in enumerate(content):
                ignored += _unknown(f"{name}.content[{j}]", part)
            content = "".join(
                part.text if isinstance(part, TextPart) else part.refusal for part in content
            )
        role = "system" if message.role == "developer" else message.role
        turns.append(Message(role=role, content=content))
    return turns, ignored


def _unknown(name: str, value: _Object) -> list[str]:
    """Return the names of other fields; an empty value, as responses have them, is not named."""
    extra = value.model_extra or {}
    return [f"{name}.{field}" for field, given in extra.items() if given not in (None, [], {})]


def refusal(error: ErrorDetails) -> ApiError:
    """Return pydantic's error in a list of messages in this server's words."""
    *_, field = error["loc"]
    kind, value = error["type"], error["input"]
    place, inside = _place(error["loc"])
    tag = error.get("ctx", {}).get("tag")
    match kind:
        case "union_tag_invalid" if inside:
            return _wrong_part(place, tag)
        case "literal_error" if field == "type":
            return _wrong_part(place, value)
        case "union_tag_invalid":
            expected = "developer, system, user or assistant"
            text = f"{place} has the role {tag!r:.40}, expected {expected}"
            return ApiError(BAD_INPUT, text, param=f"{place}.role")
        case "union_tag_not_found" | "missing" if field != "content":
            missing = field if kind == "missing" else "type" if inside else "role"
            return ApiError(BAD_INPUT, f"{place} has no {missing}, expected one", param=place)
        case "too_short":
            text = "messages is empty, expected at least one user message; add one"
            return ApiError(BAD_INPUT, text, param=place)
        case "none_required" | "too_long":
            name = f"{place}.{field}"
            return ApiError(UNSUPPORTED, f"{name} is not supported, leave it out", param=name)
        case "string_type":
            return wrong(f"{place}.{field}", value, "a string")
        case "list_type" | "missing" if place != "messages":
            got = None if kind == "missing" else value
            return wrong(f"{place}.content", got, "text or a list of text parts")
    if inside:
        return wrong(place, value, "an object with type and text")
    expected = "a list of messages" if place == "messages" else "an object with role and content"
    return wrong(place, value, expected)


def _wrong_part(place: str, kind: object) -> ApiError:
    text = f"{place} has the type {kind!r:.40}, which is not supported; send text"
    return ApiError(BAD_INPUT, text, param=place)


def _place(loc: Sequence[int | str]) -> tuple[str, bool]:
    """Return the name of a message or of a part of its content, and whether it is a part."""
    numbers = [step for step in loc if isinstance(step, int)]
    if len(numbers) > 1:
        return f"messages[{numbers[0]}].content[{numbers[1]}]", True
    return f"messages[{numbers[0]}]" if numbers else "messages", False


def wrong(name: str, value: Any, expected: str) -> ApiError:
    """Return the error for a value of a parameter: what, got, expected."""
    return ApiError(BAD_INPUT, f"{name} is {value!r:.40}, expected {expected}", param=name)
