"""The folder that this program keeps between runs: compiled programs, converted weights."""

import os
import pathlib

VARIABLE = "LLAMA_JAX_CACHE"


def user_cache() -> pathlib.Path:
    """Return $LLAMA_JAX_CACHE, else llama_jax in the user's cache folder; it may not exist yet.

    Raises:
        RuntimeError: the user has no home.
    """
    if named := os.environ.get(VARIABLE):
        return pathlib.Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the XDG rule, for an empty one too
        home = "~/.cache"
    return pathlib.Path(home).expanduser() / "llama_jax"
