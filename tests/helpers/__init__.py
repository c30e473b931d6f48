"""What several test modules share."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
"""The checkout."""
