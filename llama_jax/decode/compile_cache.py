"""Compiled programs kept on disk, so that a second run starts without compiling."""

import os
import pathlib
import time
import warnings
import zlib

import jax

from llama_jax.user_cache import user_cache

_ENTRIES = "*-cache"
_CHECKED = "checked"
"""An empty file that is as old as the last check: entries older than it are not read again."""

_ZSTD = b"\x28\xb5\x2f\xfd"


def use_compile_cache() -> str | None:
    """Have JAX keep what it compiles in the user's cache folder, unless it is configured already.

    This changes settings of the whole process, so only its owner should call it: `run.py` does, and
    a notebook may. `LLAMA_JAX_CACHE`, or `JAX_COMPILATION_CACHE_DIR` for these alone, names another
    folder; `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. What is in the folder is run as
    code: it is its owner's alone.

    Entries that are corrupt, as a full disk leaves them, are removed: JAX would warn of each in
    every run, and never write it again.

    Returns:
        A warning that entries were removed, or that nothing can be kept; None: all is well.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return None
    try:
        folder = user_cache() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        warning = _remove_corrupt(folder)
    except (OSError, RuntimeError) as error:  # no home, another's folder, a full or read-only disk
        reason = getattr(error, "strerror", None) or error
        return f"no cache of compiled programs ({reason}): each run compiles anew"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The disk may get full later: a line for each program would say no more than the first.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    # JAX would leave out what compiles within a second: the demo model's programs.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return warning


def _remove_corrupt(folder: pathlib.Path) -> str | None:
    """Remove the entries that cannot be read, of those written since the last check; say so."""
    stamp, began = folder / _CHECKED, time.time()
    last = stamp.stat().st_mtime if stamp.exists() else 0.0
    written = [entry for entry in folder.glob(_ENTRIES) if entry.stat().st_mtime >= last]
    corrupt = [entry for entry in written if not _is_whole(entry)]
    for entry in corrupt:
        entry.unlink(missing_ok=True)
    stamp.touch()
    os.utime(stamp, (began, began))
    if not corrupt:
        return None
    return (
        f"removed {len(corrupt):,} corrupt entries of {folder}: these programs are compiled again"
    )


def _is_whole(entry: pathlib.Path) -> bool:
    """Return whether an entry can be decompressed: by zstandard if JAX finds it, else by zlib."""
    try:
        content = entry.read_bytes()
        if content.startswith(_ZSTD):
            import zstandard

            zstandard.ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except OSError:
        raise
    except Exception:  # each of the two has its own error; an entry without its package is lost too
        return False
    return True
