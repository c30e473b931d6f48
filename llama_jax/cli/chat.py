"""The verb chat: talk in turns."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_jax.cli.console import keeping_interrupts, note, summary, waiting
from llama_jax.cli.conversation import Conversation
from llama_jax.cli.files import expand, read_bytes
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import load_model
from llama_jax.cli.reader import in_terminal, read_turns
from llama_jax.cli.requests import parameters_from_flags
from llama_jax.engine.fit import ContextError
from llama_jax.engine.request import make_request
from llama_jax.engine.stream import Stream
from llama_jax.errors import InputError
from llama_jax.strict_json import parse_json
from llama_jax.text.chat import Message

WELCOME = "/help lists commands. Ctrl-C stops an answer; Ctrl-D or /exit ends the chat."


def chat() -> None:
    """Answer turn by turn until /exit or the end of the input."""
    parameters = parameters_from_flags()
    # Before the weights: a mistake should not take a minute to show.
    parameters["allow_control_tags"] = FLAGS.allow_control_tags
    request = make_request(prompt="x", system=FLAGS.system, **parameters)
    llm = load_model(requests=[request])
    session = Session(Conversation(llm, FLAGS.system, parameters), brief=in_terminal())
    note(WELCOME)
    for text in read_turns([*COMMANDS, "/exit"]):
        try:
            if not session.take(text):
                return
        except InputError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("\nstopped: the conversation is as it was before; /retry asks again")


class Command(NamedTuple):
    """What a line that begins with its name does."""

    argument: str
    """In the help; empty: it takes none."""
    help: str
    run: Callable[["Session", str], None]


class Session:
    """Questions, commands, and answers as they come.

    Args:
        conversation: the turns so far.
        brief: say of an answer what a person wants to know, not where the time went.
    """

    def __init__(self, conversation: Conversation, *, brief: bool):
        self._talk, self._brief = conversation, brief
        self._unanswered: str | None = None
        """A question that was stopped or refused, for /retry."""
        self._too_long: str | None = None
        """A question that the context had no room for, for /drop."""
        self._own_file: str | None = None
        """The file of this conversation, which /save may replace."""

    def take(self, text: str) -> bool:
        """Run a command or answer a question; return whether the chat goes on.

        Raises:
            InputError: nothing changes then.
            KeyboardInterrupt: the answer was stopped; the conversation is as it was before.
        """
        name, _, rest = text.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name.startswith("/"):
            if name not in COMMANDS:
                raise InputError(f"unknown command {name!r:.40}; /help lists them")
            command = COMMANDS[name]
            if rest and not command.argument:
                raise InputError(f"{name} takes nothing, got {rest!r:.40}; drop it")
            command.run(self, rest.strip())
        elif text:
            self._answer(text)
        return True

    def _answer(self, question: str) -> None:
        """Answer a question; keep both turns."""
        try:
            stream = self._talk.ask(question)
        except ContextError as error:
            self._unanswered = self._too_long = question
            raise InputError(_context_full(error) if self._talk.turns else str(error)) from None
        self._print(question, stream)

    def _print(self, question: str, stream: Stream) -> None:
        """Print an answer as it comes, then a line about it; keep both turns."""
        self._unanswered, self._too_long = question, None
        pieces = iter(stream)
        with keeping_interrupts() as check:
            with waiting("reading" if self._talk.last else "compiling and reading"):
                first = next(pieces, "")
            for piece in itertools.chain([first], pieces):
                check()
                print(piece, end="", flush=True)
        print()
        self._unanswered = None
        self._talk.keep(question, stream.result)
        note(self._footer() if self._brief else self._summary())

    def _footer(self) -> str:
        """Return one line: tokens, rate, seed, and how full the context is."""
        result = self._talk.last
        assert result is not None
        usage, rate = result.usage, result.timings.decode_tokens_per_s
        parts = [f"{usage.completion_tokens:,} tokens"]
        parts += [] if rate is None else [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"]
        parts += [f"seed {result.seed}", f"{usage.total_tokens:,} of {self._talk.llm.context:,}"]
        if result.finish_reason == "length":
            is_full = usage.total_tokens >= self._talk.llm.context
            parts.append("cut off: the context is full" if is_full else "cut off at max_tokens")
        return f"({', '.join(parts)})"

    def _summary(self) -> str:
        if self._talk.last is None:
            raise InputError("there is no answer yet; ask something")
        is_drawn = self._talk.parameters["seed"] is None
        return summary(self._talk.llm, self._talk.last, "/seed {}" if is_drawn else "")

    def _help(self, _: str) -> None:
        lines = [f"{name} {c.argument}".ljust(14) + c.help for name, c in COMMANDS.items()]
        lines += ["/exit".ljust(14) + "end the chat; Ctrl-D does so too"]
        note("\n".join(lines))

    def _stats(self, _: str) -> None:
        note(self._summary())

    def _retry(self, _: str) -> None:
        if self._unanswered is not None:
            return self._answer(self._unanswered)
        turns = list(self._talk.turns)
        question = self._talk.take_back()
        if (seed := self._talk.parameters["seed"]) is not None:
            note(f"the seed is {seed}, so the answer will be the same; /seed N sets another")
        try:
            self._answer(question)
        except (InputError, KeyboardInterrupt):
            self._talk.turns = turns
            self._forget_question()  # it has its first answer still
            raise

    def _drop(self, _: str) -> None:
        if self._too_long is None:
            self._talk.drop_oldest()
            return note(f"dropped the oldest turn; {_count(self._talk.turns)} left")
        question = self._too_long
        dropped, stream = self._talk.ask_with_less(question)
        note(f"dropped the oldest {dropped:,}; {_count(self._talk.turns)} left. {question}")
        return self._print(question, stream)

    def _reset(self, _: str) -> None:
        self._talk.turns = []
        self._forget_question()
        note("conversation forgotten")

    def _system(self, text: str) -> None:
        self._talk.set_system(text or None)
        self._forget_question()
        note(f"system prompt {'set' if text else 'removed'}, conversation forgotten")

    def _forget_question(self) -> None:
        self._unanswered = self._too_long = None

    def _seed(self, text: str) -> None:
        self._talk.set_seed(text)

    def _save(self, name: str) -> None:
        path = expand(_required("/save", name), name)
        if path.exists() and str(path) != self._own_file:
            raise InputError(f"{name} exists already; name another file")
        try:
            self._talk.save(path)
        except OSError as error:
            raise InputError(f"{name}: {error.strerror or error}; name another file") from None
        self._own_file = str(path)
        note(f"saved {_count(self._talk.turns)}; /load {name} goes on from here")

    def _load(self, name: str) -> None:
        content = read_bytes(_required("/load", name), name)
        self._talk.load(parse_json(content, name))
        self._own_file = str(expand(name, name))
        self._forget_question()
        note(f"loaded {_count(self._talk.turns)}")


COMMANDS = {
    "/help": Command("", "list the commands", Session._help),
    "/retry": Command("", "answer the last question again, with another seed", Session._retry),
    "/stats": Command("", "where the time of the last answer went", Session._stats),
    "/save": Command("FILE", "write the conversation as JSON", Session._save),
    "/load": Command("FILE", "go on with a saved conversation", Session._load),
    "/drop": Command("", "forget the oldest turns, to make room", Session._drop),
    "/reset": Command("", "forget the conversation", Session._reset),
    "/system": Command("TEXT", "set the system prompt, forget the conversation", Session._system),
    "/seed": Command("N", "set the seed of the answers from now on", Session._seed),
}


def _context_full(error: ContextError) -> str:
    answer = f", and max_tokens is {error.max_tokens:,}" if error.max_tokens > 1 else ""
    return (
        f"the context is full: the conversation has {error.prompt_tokens:,} tokens{answer}, of "
        f"{error.context:,}; /drop forgets the oldest turns and asks again, /reset forgets all"
    )


def _count(turns: Sequence[Message]) -> str:
    count = len(turns) // 2
    return f"{count:,} turn{'' if count == 1 else 's'}"


def _required(command: str, name: str) -> str:
    if not name or name == "-":
        raise InputError(f"{command} names no file; write {command} FILE")
    return name
