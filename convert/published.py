"""Known facts about published weights: Meta's checksums and the configs of Llama 2."""

import hashlib
import pathlib
from collections.abc import Callable

from convert.corruption import abbreviate, corrupted
from convert.hf_files import is_file_name
from llama_jax.config import ModelConfig
from llama_jax.errors import InputError
from llama_jax.progress import progress_bar
from llama_jax.regular_file import open_regular, read_regular

_PRESETS = pathlib.Path(__file__).with_name("configs")  # in a checkout a link to ../configs
_SHAPE = ("vocab_size", "dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads")
_BLOCK = 2**22  # bytes read at a time


def check_list(path: pathlib.Path, *, progress: bool = False) -> int:
    """Compare files with the MD5 sums that Meta publishes beside them.

    Args:
        path: checklist.chk or tokenizer_checklist.chk: lines of a sum and a file's name.
        progress: show a bar on stderr.

    Returns:
        How many files were compared.

    Raises:
        InputError: the list is no such list, or a file is missing or differs.
    """
    sums: dict[str, str] = {}
    try:
        text = read_regular(path).decode("utf-8", errors="replace")
    except OSError as error:
        raise corrupted(path, "list of checksums") from error
    for line in text.splitlines():
        md5, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*")
        if not line.strip() or name == path.name:
            continue
        if len(md5) != 32 or not is_file_name(name):
            raise InputError(
                f"{path}: got the line {line[:60]!r}, expected an MD5 sum and a file's name; "
                "download it again"
            )
        sums[name] = md5.lower()
    files = {name: path.parent / name for name in sums}
    problems = [f"{name} is missing" for name, file in files.items() if not file.exists()]
    there = {name: file for name, file in files.items() if file.exists()}
    total = sum(file.stat().st_size for file in there.values())
    with progress_bar(total=total, unit="B", label="checking", shown=progress) as bar:
        for name, file in there.items():
            bar.set_postfix_str(name, refresh=False)
            if _md5(file, bar.update) != sums[name]:
                problems.append(f"{name} is not the published file")
    if problems:
        raise InputError(f"{path}: {abbreviate(problems)}; download the named files again")
    return len(there)


def _md5(path: pathlib.Path, update: Callable[[int], object]) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            md5.update(block)
            update(len(block))
    return md5.hexdigest()


def differences(config: ModelConfig) -> list[str]:
    """Describe how a config differs from the Llama 2 of the same shape."""
    for path in sorted(_PRESETS.glob("*.json")):
        preset = ModelConfig.load(path)
        if all(getattr(config, name) == getattr(preset, name) for name in _SHAPE):
            return [
                f"{name} is {getattr(config, name)}, {path.stem}'s is {getattr(preset, name)}"
                for name in ("norm_eps", "rope_theta", "max_seq_len", "tie_embeddings")
                if getattr(config, name) != getattr(preset, name)
            ]
    return []
