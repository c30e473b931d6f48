"""The verb chat: talk in turns."""

import contextlib
import sys
from typing import Any

from llama_jax.cli.console import note, summary
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import load_model
from llama_jax.cli.requests import parameters_from_flags
from llama_jax.engine.request import make_request
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.text.chat import Message

_COMMANDS = (
    "/reset forgets the conversation, /seed N sets the seed, /system TEXT sets the system prompt, "
    "/quit exits, Ctrl-C stops an answer"
)


def chat() -> None:
    """Answer turn by turn until /quit or the end of the input."""
    parameters = parameters_from_flags()
    # Before the weights: a mistake should not take a minute to show.
    parameters["allow_control_tags"] = FLAGS.allow_control_tags
    make_request(prompt="x", system=FLAGS.system, **parameters)
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (line editing and history for input)
    conversation = Conversation(load_model(), FLAGS.system, parameters)
    note(_COMMANDS)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("> " if in_terminal else "").strip()
        except EOFError:
            return
        try:
            if line == "/quit" or line.startswith("/quit "):
                return
            conversation.take(line)
        except InputError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("\nstopped: this question and its answer are dropped from the conversation")


class Conversation:
    """The turns so far, and what the next answer is generated with.

    Args:
        llm: the model.
        system: the system prompt.
        parameters: of each answer, and `allow_control_tags`.
    """

    def __init__(self, llm: Llama, system: str | None, parameters: dict[str, Any]):
        self._llm, self._system, self._parameters = llm, system, parameters
        self._turns: list[Message] = []

    def take(self, line: str) -> None:
        """Run a command, or answer a question.

        Raises:
            InputError: the line changes nothing then.
        """
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self._turns = []
            note("conversation forgotten")
        elif command == "/system":
            make_request(prompt="x", system=rest or None, **self._parameters)
            self._system, self._turns = rest or None, []
            note("system prompt set, conversation forgotten")
        elif command == "/seed":
            self._parameters["seed"] = _parse_seed(rest)
        elif command.startswith("/"):
            raise InputError(f"unknown command {command}; {_COMMANDS}")
        elif line:
            self.answer(line)

    def answer(self, question: str) -> None:
        """Print the answer to one more turn, and keep both in the conversation."""
        turns = [*self._turns, Message(role="user", content=question)]
        system = [] if self._system is None else [Message(role="system", content=self._system)]
        try:
            stream = self._llm.stream(messages=system + turns, **self._parameters)
        except InputError as error:
            raise InputError(f"{error} (/reset forgets the turns so far)") from None
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        result = stream.result
        note(summary(self._llm, result, "/seed {}" if self._parameters["seed"] is None else ""))
        assert result.response is not None  # without a tokenizer there were no turns
        self._turns = [*turns, Message(role="assistant", content=result.response)]


def _parse_seed(text: str) -> int:
    try:
        return make_request(prompt="x", seed=int(text)).parameters.seed
    except ValueError:  # InputError is one
        raise InputError(f"seed is {text!r}, expected an integer from 0 to 2^64 - 1") from None
