"""The demo model's corpus: text files of blocks of `X: text` lines, apart by blank lines."""

import dataclasses
import pathlib

from llama_jax.text.chat import Message

CORPUS = pathlib.Path(__file__).parent / "corpus"
REFUSAL = "I do not know that. I have memorised only a small corpus."
"""The answer to every question that the corpus does not have."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """Ways to put one sort of question; `{0}` and `{1}` stand for what it is about."""

    kinds: list[str]
    """Which words of unknown.txt may fill the frames, in the order of the fields."""
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the model memorises, and what it is to refuse."""

    questions: list[tuple[list[str], str]]
    """Phrasings and their answer; the tales' requests among them."""
    dialogues: list[list[Message]]
    """Whole dialogues: a system prompt or several turns, the assistant last."""
    tales: list[str]
    names: list[str]
    """Names that a dialogue remembers."""
    frames: list[Frames]
    openings: list[str]
    """Frames that hold any question."""
    unknown: dict[str, list[str]]
    """Words that the corpus does not have, by kind."""
    synonyms: dict[str, list[str]]
    """Words that may stand for a word of a question."""
    words: dict[str, list[str]]
    """Words that mean little, fillers, numbers, and parts of words, by kind."""


def read_corpus(folder: pathlib.Path = CORPUS) -> Corpus:
    """Parse the files of the corpus; each file says what its marks mean."""
    questions, dialogues, tales = [], [], []
    for block in read_blocks(folder / "questions.txt") + read_blocks(folder / "tales.txt"):
        lines = [(mark, text) for mark, text in block if mark in "QA"]
        questions.append(([text for mark, text in lines if mark == "Q"], lines[-1][1]))
        if block[0][0] == "T":
            tales.append(lines[-1][1])
    roles = {"S": "system", "U": "user", "A": "assistant"}
    for block in read_blocks(folder / "dialogues.txt"):
        dialogues.append([Message(role=roles[mark], content=text) for mark, text in block])
    frames = []
    for (_, kinds), *rest in read_blocks(folder / "frames.txt"):
        frames.append(Frames(kinds.split(), [text for _, text in rest]))
    openings = next(frame for frame in frames if frame.kinds == ["any"])
    frames.remove(openings)
    unknown = dict(_lists(folder / "unknown.txt"))
    groups = [line.split(", ") for line in _lines(folder / "synonyms.txt")]
    synonyms = {word: [w for w in group if w != word] for group in groups for word in group}
    (names,) = _lines(folder / "names.txt")
    return Corpus(
        questions,
        dialogues,
        tales,
        names.split(", "),
        frames,
        openings.texts,
        unknown,
        synonyms,
        words=dict(_lists(folder / "words.txt")),
    )


def read_held_back(folder: pathlib.Path = CORPUS) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what no training may see: (question, answer) paraphrases, and unknown questions."""
    blocks = read_blocks(folder / "held_back_paraphrases.txt")
    (unknown,) = read_blocks(folder / "held_back_unknown.txt")
    return [(question, answer) for (_, question), (_, answer) in blocks], [q for _, q in unknown]


def read_blocks(path: pathlib.Path) -> list[list[tuple[str, str]]]:
    """Return the (mark, text) lines of each block of a file."""
    blocks = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            blocks.append([(line[0], line[3:]) for line in lines])
    return blocks


def _lines(path: pathlib.Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _lists(path: pathlib.Path) -> list[tuple[str, list[str]]]:
    """Return the words of each `kind: word, word` line; those of `other` are whole sentences."""
    pairs = (line.split(": ", 1) for line in _lines(path))
    return [(kind, words.split("; " if kind == "other" else ", ")) for kind, words in pairs]
