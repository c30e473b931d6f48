"""Engines in tests."""

from llama_jax.engine.engine import Engine


def rest(engine: Engine) -> None:
    """Let an engine do all there is to do."""
    for _ in range(20_000):
        if not engine.step():
            assert (engine.running, engine.queued, engine.background) == (0, 0, (0, 0))
            return
    raise AssertionError("the engine does not come to rest")
