"""Compiled programs kept on disk, so that a second run starts without compiling."""

import os

import jax

from llama_jax.user_cache import user_cache


def use_compile_cache() -> None:
    """Have JAX keep what it compiles in the user's cache folder, unless it is configured already.

    This changes settings of the whole process, so only its owner should call it: `run.py` does, and
    a notebook may. `LLAMA_JAX_CACHE`, or `JAX_COMPILATION_CACHE_DIR` for these alone, names another
    folder; `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. What is in the folder is run as
    code: it is its owner's alone.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = user_cache() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # no home, another's folder, a disk that is full or read-only
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX would leave out what compiles within a second: the demo model's programs.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
