"""Messages to token ids in Meta's dialog format (meta-llama/llama, generation.py).

Each finished pair of turns is `BOS [INST] user [/INST] assistant EOS`, encoded on its own. The
system prompt is inside the first user turn. Llama-2-chat was trained on exactly these ids.
"""

from collections.abc import Sequence
from typing import TypedDict

from llama_jax.errors import InputError, one_line
from llama_jax.text.tokenizer import BOS_ID, EOS_ID, Tokenizer, is_text

CHAT_TEMPLATE = """\
{%- set dialog = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set dialog.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<s>[INST] ' + (dialog.system + message['content']) | trim + ' [/INST]' -}}
{%- set dialog.system = '' -%}
{%- else -%}
{{- ' ' + message['content'] | trim + ' </s>' -}}
{%- endif -%}
{%- endfor -%}"""
"""The format of `encode_dialog` as a Jinja template, for clients that render it themselves. In its
text `<s>` and `</s>` are control tokens."""

_CONTROL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn."""

    role: str
    """`system` (first only), `user` or `assistant`."""
    content: str


def encode_dialog(
    messages: Sequence[Message], tokenizer: Tokenizer, *, allow_control_tags: bool = False
) -> list[int]:
    """Return the ids of a dialog's prompt: the assistant's next answer continues them.

    Args:
        messages: an optional system message, then user and assistant in turn; the last is a user's.
        tokenizer: Llama 2's, or one with the same BOS and EOS.
        allow_control_tags: see `check_dialog`.

    Raises:
        InputError: see `check_dialog`.
    """
    check_dialog(messages, allow_control_tags=allow_control_tags)
    turns = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = turns
        turns = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *rest]
    ids = []
    for user, assistant in zip(turns[:-1:2], turns[1::2], strict=True):
        text = f"[INST] {user.strip()} [/INST] {assistant.strip()} "
        ids += [BOS_ID, *tokenizer.encode(text), EOS_ID]
    return [*ids, BOS_ID, *tokenizer.encode(f"[INST] {turns[-1].strip()} [/INST]")]


def check_dialog(messages: Sequence[Message], *, allow_control_tags: bool = False) -> None:
    """Refuse messages that `encode_dialog` has no ids for.

    Args:
        messages: see `encode_dialog`.
        allow_control_tags: accept the format's control tags in system and user turns. They are
            plain text to the tokenizer, and the model cannot tell them from the format's own. An
            assistant turn may always contain them: the model can have generated it.

    Raises:
        InputError: naming every message with a wrong role, place or content, or with a control tag.
    """
    if not messages:
        raise InputError("messages is empty, expected at least one user message; add one")
    problems = []
    for i, message in enumerate(messages):
        problem = _message_problem(message, allow_control_tags)
        if problem:
            problems.append(f"messages[{i}] {problem}")
    if not problems:
        problems = _order_problems([message["role"] for message in messages])
    if problems:
        raise InputError(one_line(problems))


def _message_problem(message: Message, allow_control_tags: bool) -> str | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return f"is {message!r:.60}, expected an object with role and content"
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        return f"has the role {role!r:.40}, expected system, user or assistant"
    if not isinstance(content, str):
        return f"has the content {content!r:.40}, expected a string"
    if not is_text(content):
        return "is not valid Unicode: its content has a lone surrogate; send whole characters"
    tags = [tag for tag in _CONTROL_TAGS if tag in content]
    if tags and role != "assistant" and not allow_control_tags:
        return (
            f"contains the control tag {tags[0]}, which would forge a turn; remove it, or set "
            "allow_control_tags (OpenAI's routes, Python, run.py)"
        )
    return None


def _order_problems(roles: list[str]) -> list[str]:
    offset = int(roles[0] == "system")
    for i, role in enumerate(roles[offset:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            return [
                f"messages[{i + offset}] has the role {role}, expected {expected}; the order is "
                "an optional system, then user and assistant in turn"
            ]
    if roles[-1] != "user":
        return [f"the last message has the role {roles[-1]}, expected user; add the user's turn"]
    return []
