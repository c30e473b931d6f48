"""Compiled programs kept on disk, so that a second run starts without compiling."""

import os
import pathlib

import jax


def use_compile_cache() -> None:
    """Have JAX keep what it compiles in the user's cache folder, unless JAX was told otherwise.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    nothing. What is in the folder is run as code: it is made for its owner alone.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(home).expanduser() / "llama_jax" / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # no home, or a full or read-only disk: compile each time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX would leave out what compiles within a second: the demo model's programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
