"""Replay: run again what a receipt says, and judge what is not the same; see docs/receipts.md."""

from llama_jax.replay.replay import replay
from llama_jax.replay.verdict import Verdict

__all__ = ["Verdict", "replay"]
