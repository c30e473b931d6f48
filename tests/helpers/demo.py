"""The demo model in tests: what was traced for one module serves the others of its process."""

import functools
from unittest import mock

from llama_jax import Llama, llama
from llama_jax.decode.executor import Executor
from llama_jax.demo import DEMO_CHECKPOINT


@functools.cache
def _executor(slots: int) -> Executor:
    return Llama.load(DEMO_CHECKPOINT, slots=slots).executor


def load_demo(slots: int = 1) -> Llama:
    """Load it with an engine of its own and the executor of all that have as many slots.

    A test that changes the executor must restore it.
    """
    shared = _executor(slots)
    with mock.patch.object(llama, "Executor", return_value=shared):
        return Llama.load(DEMO_CHECKPOINT, slots=slots)
