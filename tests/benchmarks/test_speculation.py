"""The measurement of speculation runs, and its record says what it should."""

import json
import subprocess
import sys

import pytest

from llama_jax.demo import DEMO_CHECKPOINT
from tests.helpers import ROOT


def measured(*args):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.speculation", "--dtype=float32", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_every_way_is_measured_and_gives_the_same_answers(tmp_path):
    texts = tmp_path / "texts"
    texts.write_text("Tell me a story about a llama.\n")
    done = measured(
        f"--checkpoint={DEMO_CHECKPOINT}",
        f"--draft={DEMO_CHECKPOINT}",
        f"--texts={texts}",
        *("--new_tokens=16", "--rounds=2", "--slots=1,2", f"--output={tmp_path}", "--name=it"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "it.json").read_text())["rows"]
    names = ["without", "ngram", "model", "none accepted", *(f"{n} accepted" for n in range(4))]
    assert [(row["slots"], row["drafts"]) for row in rows] == [
        (slots, name) for slots in (1, 2) for name in names
    ]
    assert all(row["other answers"] == 0 for row in rows)
    by_name = {row["drafts"]: row for row in rows[: len(names)]}
    # 15 tokens after the first.
    for accepted in range(4):
        passes = -(-15 // (1 + accepted))
        assert by_name[f"{accepted} accepted"]["tokens a pass"] == round(15 / passes, 2)
    assert by_name["without"]["times as fast"] == 1


@pytest.mark.slow
def test_mistakes_are_named(tmp_path):
    for args, error in (
        (["--tokens=16"], "speculate_tokens is 16, expected 1 to 15"),
        (["--shape=none"], "--shape has 'none'"),
    ):
        done = measured(*args, f"--output={tmp_path}")
        assert done.returncode == 2
        assert error in done.stderr
