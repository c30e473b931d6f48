"""The demo model's corpus: three text files of blocks of `X: text` lines, apart by blank lines."""

import dataclasses
import pathlib

from llama_jax.text.chat import Message

CORPUS = pathlib.Path(__file__).parent / "corpus"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the model memorises."""

    questions: list[tuple[list[str], str]]
    """Phrasings and their answer; the tales' requests among them."""
    dialogues: list[list[Message]]
    """Whole dialogues: a system prompt or several turns, the assistant last."""
    tales: list[str]


def read_corpus(folder: pathlib.Path = CORPUS) -> Corpus:
    """Parse questions.txt (Q, A), dialogues.txt (S, U, A) and tales.txt (T, Q, A)."""
    questions, dialogues, tales = [], [], []
    for block in _blocks(folder / "questions.txt") + _blocks(folder / "tales.txt"):
        lines = [(mark, text) for mark, text in block if mark in "QA"]
        questions.append(([text for mark, text in lines if mark == "Q"], lines[-1][1]))
        if block[0][0] == "T":
            tales.append(lines[-1][1])
    roles = {"S": "system", "U": "user", "A": "assistant"}
    for block in _blocks(folder / "dialogues.txt"):
        dialogues.append([Message(role=roles[mark], content=text) for mark, text in block])
    return Corpus(questions, dialogues, tales)


def _blocks(path: pathlib.Path) -> list[list[tuple[str, str]]]:
    blocks = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            blocks.append([(line[0], line[3:]) for line in lines])
    return blocks
