"""The embedded demo model: about a million parameters that memorised tools/corpus, no more."""

import functools
import json
import pathlib

DEMO_CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"

SELFTEST = pathlib.Path(__file__).parent / "selftest.jsonl"
"""Receipts of runs of this model; tools/record_selftest.py writes them."""


def is_demo(root: str | None) -> bool:
    """Tell whether weights are the demo model's, by their root digest, wherever they were read."""
    return root is not None and root == _root()


@functools.cache
def _root() -> str:
    return json.loads((DEMO_CHECKPOINT / "manifest.json").read_text(encoding="utf-8"))["root"]
