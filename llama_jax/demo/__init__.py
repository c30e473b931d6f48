"""The embedded demo model: about a million parameters that memorised tools/corpus, no more."""

import pathlib

DEMO_CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"

SELFTEST = pathlib.Path(__file__).parent / "selftest.jsonl"
"""Receipts of runs of this model; tools/record_selftest.py writes them."""
