"""Every command of docs/ runs as it is written, or the page says above it what it needs.

A block without such a line runs here, in a folder with run.py and what the pages name, unless
another test runs it and looks at its results.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from llama_jax.cli.verbs import VERBS
from llama_jax.demo import DEMO_CHECKPOINT
from tests.helpers import ROOT
from tests.helpers.documents import serving, shell

NEEDS = re.compile(r"\*Needs [^*]+\. No test runs (it|them)\.\*")
"""The line above commands that no test runs."""

_SIGNED = "cli/test_verify_receipt.py::test_the_examples_of_the_documentation"
RUN_ELSEWHERE = {
    "api.md: OPENAI_API_KEY=secret lm_eval run ": "server/test_clients.py::test_lm_eval",
    "checkpoints.md: openssl genpkey -algorithm ec ": (
        "weights/test_signature.py::test_another_key_fails_it"
    ),
    "receipts.md: openssl genpkey -algorithm ed25519 ": _SIGNED,
    'receipts.md: python run.py --prompt="What is the capital of France?" '
    "--receipt=receipt.json ": _SIGNED,
    "receipts.md: python -c '": _SIGNED,
    "reproducibility.md: python run.py selftest\n": (
        "cli/test_replay.py::test_the_commands_of_the_page"
    ),
}
"""The tests that run other blocks, by page and beginning."""


class Block(NamedTuple):
    """Shell commands of a page."""

    page: str
    text: str
    is_marked: bool
    """Whether the page says that no test runs them."""

    @property
    def test(self) -> str | None:
        """The other test that runs them."""
        name = f"{self.page}: {self.text}"
        return next((t for start, t in RUN_ELSEWHERE.items() if name.startswith(start)), None)

    @property
    def is_server(self) -> bool:
        """Whether the first command serves, and so does not end."""
        first = self.text.partition("\n")[0]
        return first.startswith("python run.py serve ") and "--estimate" not in first

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each command that is one of this repository's."""
        for line in self.text.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if words[:1] in (["python"], ["bash"]):
                yield words


def read_blocks() -> Iterator[Block]:
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text("utf-8")
        for match in re.finditer(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            above = text[: match.start()].rstrip().rpartition("\n\n")[2]
            yield Block(path.name, match[1], NEEDS.fullmatch(above.replace("\n", " ")) is not None)


BLOCKS = list(read_blocks())


def case(block: Block):
    """A parameter. Many processes are slow, and so is a server, which compiles its programs."""
    first, *_ = block.text.splitlines()
    is_slow = not block.is_marked and (block.is_server or len(list(block.commands)) > 1)
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(block, id=f"{block.page}: {first}", marks=marks)


@pytest.fixture
def folder(tmp_path):
    """What the pages take to be there: run.py, configs, a checkpoint and texts to score."""
    for name in ("run.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "llama-2-7b-chat-jax").symlink_to(DEMO_CHECKPOINT)
    (tmp_path / "book.txt").write_text("Once upon a time there was a llama.\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "The capital of", "continuation": " Peru"}\n')
    return tmp_path


@pytest.mark.parametrize(
    "block", [case(block) for block in BLOCKS if not (block.is_marked or block.test)]
)
def test_a_block_runs_as_it_is_written(block, folder):
    if not block.is_server:
        shell(block.text, folder)
        return
    command, _, others = block.text.partition("\n")
    with serving(command, folder) as port:
        shell(others.replace("8787", str(port)), folder)


def test_the_other_tests_run_blocks_that_are_there():
    found = [block.test for block in BLOCKS if block.test]
    assert sorted(found) == sorted(RUN_ELSEWHERE.values())
    for file, name in (test.split("::") for test in RUN_ELSEWHERE.values()):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8")


def test_no_block_is_marked_that_a_test_runs():
    assert [block for block in BLOCKS if block.is_marked and block.test] == []


@pytest.mark.parametrize("block", [case(block) for block in BLOCKS if block.is_marked])
def test_the_flags_of_commands_that_no_test_runs_are_there(block):
    for program, *words in block.commands:
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        if program == "bash":
            assert (ROOT / words[0]).exists()
        elif words[0] == "run.py":
            verb = words[1] if words[1] in VERBS else ""
            assert given <= {*VERBS[verb].takes}
        elif words[0] == "-m":
            module = f"{words[1]}.__main__" if words[1] == "benchmarks" else words[1]
            flags = importlib.import_module(module).FLAGS
            assert all(name in flags or name.removeprefix("no") in flags for name in given)
