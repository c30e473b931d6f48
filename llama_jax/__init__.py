"""Llama 2 chat in JAX: one set of weights, one prompt, one seed, one text.

>>> from llama_jax import Llama
>>> llm = Llama.load()  # the embedded demo model; or a folder that `python -m convert` wrote
>>> llm.generate(prompt="What is the capital of France?", temperature=0).response
'The capital of France is Paris.'
"""

from llama_jax.config import ModelConfig
from llama_jax.decode.compile_cache import use_compile_cache
from llama_jax.engine.refusals import QueueFullError
from llama_jax.engine.result import Result
from llama_jax.engine.score import Score
from llama_jax.engine.stream import Stream
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.version import __version__

__all__ = [
    "InputError",
    "Llama",
    "ModelConfig",
    "QueueFullError",
    "Result",
    "Score",
    "Stream",
    "__version__",
    "use_compile_cache",
]
