"""Where the turns of a chat come from: a person at a terminal, or lines of a file or pipe."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama_jax.user_cache import user_cache

if TYPE_CHECKING:  # a sixth of a second, which only terminals need
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyPressEvent


def in_terminal() -> bool:
    """Return whether a person types and reads here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_turns(commands: Sequence[str]) -> Iterator[str]:
    """Return the turns, without the space around them, to the end of the input.

    Args:
        commands: what Tab completes.
    """
    return _from_terminal(commands) if in_terminal() else _from_lines()


def _from_lines() -> Iterator[str]:
    """A line is a turn."""
    while True:
        try:
            yield input().strip()
        except EOFError:
            return


def _from_terminal(commands: Sequence[str]) -> Iterator[str]:
    """Enter sends what was typed; Alt-Enter begins a line; a paste is one turn with all its lines.

    The arrow keys bring back what was typed in earlier chats too. Ctrl-C clears what was typed,
    Ctrl-D ends the chat.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _begin_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    session = PromptSession(
        "> ",
        history=_history(),
        key_bindings=keys,
        prompt_continuation="  ",
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            yield session.prompt().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _history() -> "History":
    """Return what was typed in earlier chats; only in this one, if no file can be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path = user_cache() / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(path)
