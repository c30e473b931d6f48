"""The messages that docs/troubleshooting.md explains are those of the program."""

import ast
import re

import pytest

from llama_jax.cli.verbs import VERBS
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
QUOTED = (
    "Authentication error",
    "Ai: Capacity temporarily exceeded, please try again.",
    "Too many requests from your address wait already",
    "its device is out of memory",
    "it has ended",
)
"""Of messages that its sentences quote."""

VALUE = "\0"
"""In the place of what a message is filled with."""


def text_of(node: ast.AST) -> str | None:
    """Return the text of a literal, with VALUE for each of its values; None: it is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%s|\{[^{}]*\}", VALUE, node.value)
    return None


@pytest.fixture(scope="module")
def texts():
    """All texts of the program, without the word that begins a line of error."""
    found = set()
    for folder in ("llama_jax", "convert"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            found |= {text.removeprefix("error: ") for node in nodes if (text := text_of(node))}
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_the_program_s(message, texts):
    """Its beginning, unless that is left out by an ellipsis."""
    is_whole = not message.startswith("...")
    fixed = message.removeprefix("...").lstrip().split("...")
    pattern = re.compile(f"{VALUE}+".join(map(re.escape, fixed)))
    find = pattern.match if is_whole else pattern.search
    assert any(map(find, texts))


@pytest.mark.parametrize("text", QUOTED)
def test_a_text_in_a_sentence_is_the_program_s(text, texts):
    assert f"`{text}`" in PAGE
    assert any(found.startswith(text) for found in texts)


def test_there_are_enough_of_them_and_each_once():
    assert len(MESSAGES) == len(set(MESSAGES)) >= 20
    assert len(re.findall(r"^### ", PAGE, re.MULTILINE)) == len(MESSAGES)


def test_the_flags_that_cure_are_there():
    sources = (ROOT / "convert/__main__.py").read_text("utf-8")
    known = {flag for verb in VERBS.values() for flag in verb.takes}
    known |= set(re.findall(r'"--([a-z_]+)"', sources))
    for code in re.findall(r"`([^`]+)`", PAGE):
        for flag in re.findall(r"(?:^|\s)--([a-z_]+)", code):
            assert flag in known, flag
