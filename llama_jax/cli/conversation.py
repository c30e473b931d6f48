"""A conversation: the turns so far, and what the next answer is generated with."""

import json
import pathlib
from typing import Any

from llama_jax.engine.request import make_request
from llama_jax.engine.result import Result
from llama_jax.engine.stream import Stream
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.text.chat import Message


class Conversation:
    """Turns of a user and a model.

    Args:
        llm: the model.
        system: the system prompt.
        parameters: of each answer, and `allow_control_tags`.
    """

    def __init__(self, llm: Llama, system: str | None, parameters: dict[str, Any]):
        self.llm, self.system, self.parameters = llm, system, parameters
        self.turns: list[Message] = []
        """A question and its answer, in turns."""
        self.last: Result | None = None
        """Of the answer that was generated last."""

    @property
    def messages(self) -> list[Message]:
        """The system prompt, if there is one, and the turns."""
        system = [] if self.system is None else [Message(role="system", content=self.system)]
        return system + self.turns

    def ask(self, question: str) -> Stream:
        """Begin an answer; `keep` makes it part of the conversation.

        Raises:
            InputError: the question cannot be asked, or does not fit the context.
        """
        asked = [*self.messages, Message(role="user", content=question)]
        return self.llm.stream(messages=asked, **self.parameters)

    def keep(self, question: str, result: Result) -> None:
        """Append a question and its answer."""
        assert result.response is not None, "without a tokenizer there is no conversation"
        self.last = result
        self.turns += [
            Message(role="user", content=question),
            Message(role="assistant", content=result.response),
        ]

    def take_back(self) -> str:
        """Remove the last question and its answer; return the question.

        Raises:
            InputError: there is none.
        """
        if not self.turns:
            raise InputError("there is no answer yet; ask something")
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def drop_oldest(self) -> None:
        """Remove the first question and its answer.

        Raises:
            InputError: there is none.
        """
        if not self.turns:
            raise InputError("there is no turn to drop")
        self.turns = self.turns[2:]

    def ask_with_less(self, question: str) -> tuple[int, Stream]:
        """Begin an answer to a question that does not fit the context, without the oldest turns.

        So many are removed that the answer has room: `max_tokens`, or half of the context.

        Returns:
            How many turns were removed, and the answer.

        Raises:
            InputError: there is no turn, or the question does not fit alone; nothing changes then.
        """
        turns = self.turns
        self.drop_oldest()
        room = min(self.llm.context // 2, self.parameters["max_tokens"] or self.llm.context)
        while self.turns and self._num_tokens(question) + room > self.llm.context:
            self.drop_oldest()
        try:
            return (len(turns) - len(self.turns)) // 2, self.ask(question)
        except InputError:
            self.turns = turns
            raise

    def _num_tokens(self, question: str) -> int:
        asked = [*self.messages, Message(role="user", content=question)]
        request = make_request(messages=asked, **self.parameters)
        return len(request.encode(self.llm.tokenizer, self.llm.config.vocab_size))

    def set_system(self, text: str | None) -> None:
        """Set the system prompt, and forget the turns.

        Raises:
            InputError: it is none; nothing changes then.
        """
        make_request(prompt="x", system=text, **self.parameters)
        self.system, self.turns = text, []

    def set_seed(self, text: str) -> None:
        """Set the seed of the answers from now on.

        Raises:
            InputError: it is none; nothing changes then.
        """
        try:
            self.parameters["seed"] = make_request(prompt="x", seed=int(text)).parameters.seed
        except ValueError:  # InputError is one
            raise InputError(f"seed is {text!r}, expected an integer from 0 to 2^64 - 1") from None

    def save(self, path: pathlib.Path) -> None:
        """Write the messages as JSON; `path` is replaced whole.

        Raises:
            OSError: it cannot be written; what was there is there still.
        """
        text = json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n"
        part = path.with_name(path.name + ".part")
        part.write_text(text, "utf-8")
        part.replace(path)

    def load(self, messages: Any) -> None:
        """Go on with messages, as `save` writes them, in place of the turns so far.

        Raises:
            InputError: they are no such list; nothing changes then.
        """
        if not isinstance(messages, list):
            raise InputError(f"got {messages!r:.40}, expected a list of messages")
        question = Message(role="user", content="x")
        request = make_request(messages=[*messages, question], **self.parameters)
        assert request.messages is not None
        earlier = list(request.messages)[:-1]
        has_system = bool(earlier) and earlier[0]["role"] == "system"
        self.system = earlier[0]["content"] if has_system else None
        self.turns = earlier[has_system:]
