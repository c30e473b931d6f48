"""Checkpoints in the project's own format: one layout, one version number.

DST/params/         Orbax, one array per parameter, none stacked over layers
DST/config.json     ModelConfig
DST/tokenizer.model SentencePiece; absent if the source had none
DST/manifest.json   format version, dtype, where the weights came from
"""

import dataclasses
import json
import logging
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llama_jax.config import ModelConfig
from llama_jax.errors import InputError, one_line
from llama_jax.files import read_json
from llama_jax.model import Params, param_shapes

FORMAT_VERSION = 1
DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint."""

    config: ModelConfig
    params: Params
    dtype: str
    """The dtype of `params`, one of DTYPES."""
    tokenizer: pathlib.Path | None


def save_checkpoint(
    path: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    *,
    tokenizer: str | pathlib.Path | None = None,
    origin: dict[str, str] | None = None,
) -> None:
    """Write a checkpoint that is either whole or not there.

    Args:
        path: a folder that does not exist yet.
        params: the model's parameters, NumPy or JAX arrays of one of DTYPES.
        config: the shape they have.
        tokenizer: the tokenizer.model to copy.
        origin: where the weights came from, for the manifest.

    Raises:
        InputError: `path` exists.
    """
    path = pathlib.Path(path).absolute()
    check_absent(path)
    expected = jax.tree.map(lambda a: a.shape, param_shapes(config))
    assert jax.tree.map(lambda a: a.shape, params) == expected, "parameters unlike the config"
    (dtype,) = {str(array.dtype) for array in jax.tree.leaves(params)}

    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the goal and renamed at the end: an interrupted run leaves no half checkpoint.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.partial-") as partial:
        draft = pathlib.Path(partial) / path.name
        with _checkpointer() as checkpointer:
            checkpointer.save(draft / "params", args=ocp.args.PyTreeSave(params))
        # Orbax's own mark of success names the draft's path; here the rename below is the mark.
        (draft / "params" / "commit_success.txt").unlink(missing_ok=True)
        (draft / "config.json").write_text(config.to_json(), encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, draft / "tokenizer.model")
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "origin": origin or {},
            "files": _file_sizes(draft),
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (draft / "manifest.json").write_text(text, encoding="utf-8")
        draft.rename(path)


def _file_sizes(folder: pathlib.Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def check_absent(path: str | pathlib.Path) -> None:
    """Refuse to write over what exists."""
    if pathlib.Path(path).exists():
        raise InputError(f"{path} already exists; remove it or name another folder")


def load_checkpoint(path: str | pathlib.Path, dtype: str | None = None) -> Checkpoint:
    """Restore a checkpoint onto the default device.

    Args:
        path: the folder `save_checkpoint` or `python -m convert` wrote.
        dtype: one of DTYPES, to cast the weights to; None keeps the stored one (on a TPU, which
            has no float16 products, bfloat16 in its place).

    Raises:
        InputError: the folder is missing, a file, empty, half there, of another version, or its
            arrays are not those that its config asks for.
    """
    path = pathlib.Path(path).expanduser().absolute()
    stored_dtype = _check_layout(path)
    config = ModelConfig.load(path / "config.json")
    dtype = _run_dtype(dtype or stored_dtype, asked=dtype is not None)
    params = _restore(path, config, dtype)
    tokenizer = path / "tokenizer.model"
    return Checkpoint(config, params, dtype, tokenizer if tokenizer.exists() else None)


def _check_layout(path: pathlib.Path) -> str:
    """Return the stored dtype of a folder that looks whole."""
    try:
        if not path.exists():
            raise InputError(f"checkpoint {path} does not exist; check the path")
        if not path.is_dir():
            raise InputError(f"checkpoint {path} is a file, expected the folder convert wrote")
        missing = [n for n in ("manifest.json", "config.json", "params") if not (path / n).exists()]
        remedy = _missing_remedy(path) if missing else ""
        sizes = _file_sizes(path)
    except OSError as error:
        raise InputError(
            f"checkpoint {str(path)[:200]} cannot be read ({error.strerror}); "
            "check the path and its permissions"
        ) from None
    if missing:
        raise InputError(f"checkpoint {path} has no {', '.join(missing)}; {remedy}")
    manifest = read_json(path / "manifest.json")
    version, dtype, files = (manifest.get(key) for key in ("format_version", "dtype", "files"))
    if version != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format version {version!r}, this program reads "
            f"{FORMAT_VERSION}; convert the weights again"
        )
    if dtype not in DTYPES or not isinstance(files, dict):
        raise InputError(
            f"{path / 'manifest.json'} is damaged: dtype is {dtype!r}, expected one of "
            f"{', '.join(DTYPES)}, and files is {files!r:.40}, expected an object; "
            "convert the weights again"
        )
    problems = [
        f"{name} {f'has {sizes[name]} of {size} bytes' if name in sizes else 'is missing'}"
        for name, size in files.items()
        if sizes.get(name) != size
    ]
    if problems:
        raise InputError(
            f"checkpoint {path} is incomplete: {one_line(problems)}; copy or convert it again"
        )
    return dtype


def _missing_remedy(path: pathlib.Path) -> str:
    if any(path.glob("consolidated.*.pth")):
        return f"these are Meta's weights: run `python -m convert meta {path} DST` first"
    if any(path.glob("*.safetensors")):
        return f"these are Hugging Face's weights: run `python -m convert hf {path} DST` first"
    if not any(path.iterdir()):
        return "the folder is empty; name the one that convert wrote"
    return "the checkpoint is incomplete; copy or convert it again"


def _run_dtype(dtype: str, *, asked: bool) -> str:
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if dtype != "float16" or jax.default_backend() != "tpu":
        return dtype
    if asked:
        raise InputError("dtype is float16, which a TPU cannot multiply; use bfloat16")
    logging.getLogger(__name__).warning(
        "the checkpoint is float16, which a TPU cannot multiply: running in bfloat16 "
        "(8 bits of precision in place of 11)"
    )
    return "bfloat16"


def _restore(path: pathlib.Path, config: ModelConfig, dtype: str) -> Params:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype), sharding=device),
        param_shapes(config),
    )
    with _checkpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path / "params").item_metadata.tree
            _check_shapes(path, stored, abstract)
            return checkpointer.restore(
                path / "params",
                args=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                ),
            )
        except InputError:
            raise
        except Exception as error:  # Orbax has no type of its own for damage, not even one base
            raise InputError(
                f"checkpoint {path}: params are damaged (Orbax: {type(error).__name__}); "
                "copy or convert them again"
            ) from error


def _check_shapes(path: pathlib.Path, stored: Any, expected: Params) -> None:
    def flat(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {
            jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
            for keys, leaf in leaves
        }

    have, want = flat(stored), flat(expected)
    problems = [f"missing {name}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    problems += [
        f"{name} is {have[name]}, expected {want[name]}"
        for name in sorted(want.keys() & have.keys())
        if have[name] != want[name]
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            f"checkpoint {path}: arrays do not fit config.json: {one_line(problems[:8])}{more}; "
            "convert the weights again"
        )


def _checkpointer() -> ocp.Checkpointer:
    # Orbax would by default have up to 96 GB in flight beside the arrays themselves.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, save_concurrent_gb=2, restore_concurrent_gb=2
    )
    return ocp.Checkpointer(handler)
