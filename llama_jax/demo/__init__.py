"""The embedded demo model: about a million parameters that memorised tools/corpus, no more."""

import pathlib

DEMO_CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
