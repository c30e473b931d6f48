"""Checkpoints on disk: read, written and verified."""
