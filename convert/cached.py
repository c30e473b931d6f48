"""Conversion at the first use: a source's checkpoint is kept in the user's cache."""

import hashlib
import json
import pathlib
import time
from typing import Any

from convert import hub
from convert.console import report
from convert.conversion import Conversion, convert
from llama_jax.errors import InputError
from llama_jax.user_cache import VARIABLE, user_cache
from llama_jax.weights.atomic_directory import BusyError
from llama_jax.weights.manifest import FORMAT_VERSION
from llama_jax.weights.unconverted import is_repository, published_layout

_READ = {".json", ".model", ".safetensors", ".bin", ".pth", ".chk"}
"""Suffixes of the files that a conversion may read."""
_PAUSE_S = 1.0  # between looks at another process's conversion


def converted(
    path: str | pathlib.Path, dtype: str | None = None, *, progress: bool = False
) -> pathlib.Path:
    """Return the checkpoint of a source, converted unless it is in the cache already.

    Its name has a digest of the source (path, sizes and times of its files; of a repository the
    commit) and of the dtype: a source that has changed is converted again. Of several processes
    one converts, and the others wait.

    Args:
        path: a folder of Hugging Face's or Meta's, hf://ORG/NAME or hf://ORG/NAME@REV. Any other
            path is returned as it is.
        dtype: to store; None: the source's.
        progress: show bars on stderr.

    Raises:
        InputError: the source cannot be converted, or the cache cannot be written.
    """
    dtype = dtype or "source"
    snapshot = None
    if is_repository(path):
        repository = hub.parse(str(path))
        assert repository is not None
        snapshot = hub.resolve(repository)
        layout, src = "hf", pathlib.Path(repository.name.replace("/", "--"))
        identity: Any = snapshot.describe()
    else:
        src = pathlib.Path(path).expanduser().absolute()
        layout = published_layout(src)
        if layout is None:
            return pathlib.Path(path)
        identity = _identity(src, layout)
    text = json.dumps([FORMAT_VERSION, layout, dtype, identity])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        dst = user_cache() / "checkpoints" / f"{src.name}-{digest}"
        if not dst.exists():
            origin = {"folder": src.name}
            if snapshot:
                src, origin = hub.download(snapshot, progress=progress), snapshot.describe()
            _convert_once(Conversion(layout, src, dst, dtype, origin=origin), progress)
    except OSError as error:  # a full disk, no permission
        raise InputError(
            f"{path} cannot be converted into the cache: {error}; ${VARIABLE} names another folder"
        ) from error
    return dst


def _identity(src: pathlib.Path, layout: str) -> list[Any]:
    """Return what changes when a folder's files do: their names, sizes and times."""
    files = [path for path in src.iterdir() if path.suffix in _READ]
    if layout == "meta":
        files += src.resolve().parent.glob("tokenizer*")
    stats = {str(path): path.stat() for path in files if path.exists()}
    return [str(src), sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())]


def _convert_once(task: Conversion, progress: bool) -> None:
    """Convert, or wait for the process that does."""
    waiting = False
    while not task.dst.exists():
        try:
            convert(task, progress=progress)
        except BusyError:
            if not waiting:
                report(f"another process is writing {task.dst}: waiting for it")
            waiting = True
            time.sleep(_PAUSE_S)
        except InputError:
            if not task.dst.exists():  # else another process has just finished
                raise
