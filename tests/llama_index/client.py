"""Two turns of a dialog by llama-index, whole and streamed, as chats and as completions.

Prints one JSON object: from the name of llama-index's method to the two answers.

    python client.py BASE_URL TOKEN MODEL
"""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

QUESTIONS = ("What is the capital of France?", "What is the capital of Japan?")


def joined(parts):
    """Return the last part of a stream, whose text is that of all deltas."""
    parts = list(parts)
    assert len(parts) > 2
    text = "".join(part.delta or "" for part in parts)
    last = parts[-1]
    assert text == (last.message.content if hasattr(last, "message") else last.text)
    return last


def chat(ask):
    """Hold a dialog; the answers are sent back as they came."""
    messages = []
    for question in QUESTIONS:
        messages.append(ChatMessage(role="user", content=question))
        messages.append(ask(messages).message)
    return [message.content for message in messages[1::2]]


def complete(ask):
    """Hold a dialog as one growing text."""
    text, answers = "", []
    for question in QUESTIONS:
        text += f"<s>[INST] {question} [/INST]"
        answers.append(ask(text).text)
        text += f"{answers[-1]} </s>"
    return answers


def main(url, token, model):
    """Ask in each way."""
    settings = {"model": model, "api_base": url, "api_key": token, "max_retries": 0}
    settings |= {"context_window": 512, "max_tokens": 16, "temperature": 0}
    control = {"seed": 1, "extra_body": {"parse_control": True}}
    chatting = OpenAILike(**settings, is_chat_model=True, additional_kwargs={"seed": 1})
    completing = OpenAILike(**settings, additional_kwargs=control)
    answers = {
        "chat": chat(chatting.chat),
        "stream_chat": chat(lambda messages: joined(chatting.stream_chat(messages))),
        "complete": complete(completing.complete),
        "stream_complete": complete(lambda text: joined(completing.stream_complete(text))),
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
