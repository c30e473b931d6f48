"""The Hugging Face hub: from a repository's name to a folder of the files that are needed."""

import contextlib
import fnmatch
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from convert import adapter, hf_files, vocabulary
from convert.corruption import abbreviate
from convert.hub_errors import explained, is_network_error
from convert.recognition import refuse_names
from llama_jax.errors import InputError

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SCHEME = re.compile(r"hf:/+")  # pathlib writes one slash
_SETTINGS = (
    *("config.json", "generation_config.json", adapter.CONFIG, *vocabulary.FILES),
    *vocabulary.BESIDE,
)

Kinds = tuple[tuple[str, str], ...]
"""Stems and suffixes of files of weights, in the order that they are looked for."""


class Repository(NamedTuple):
    """A repository of models, and which of its states."""

    name: str
    """ORG/NAME."""
    revision: str
    """A branch, a tag or a commit."""

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


class Snapshot(NamedTuple):
    """A repository at one commit, not yet downloaded."""

    repository: Repository
    commit: str
    files: Sequence[str]
    """All that it holds, by path."""
    folder: pathlib.Path | None = None
    """Where it is already, if the hub was out of reach."""

    def describe(self) -> dict[str, str]:
        """Return what the manifest says of it."""
        return {"repository": self.repository.name, "commit": self.commit}


def parse(src: str, revision: str | None = None) -> Repository | None:
    """Return the repository that a source names; None: it is a folder.

    Args:
        src: a folder, ORG/NAME, hf://ORG/NAME or hf://ORG/NAME@REVISION. An existing folder is
            that folder, whatever its name.
        revision: in place of main.

    Raises:
        InputError: it is neither, or has two revisions.
    """
    scheme = _SCHEME.match(src)
    if not scheme and pathlib.Path(src).expanduser().exists():
        if revision is not None:
            raise InputError(f"{src} is a folder, which has no revision; drop --revision")
        return None
    name, _, written = src[scheme.end() :].partition("@") if scheme else (src, "", "")
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{src} does not exist, expected a folder, or ORG/NAME for a repository of the Hugging "
            "Face hub; check the path"
        )
    if written and revision not in (None, written):
        raise InputError(f"{src} names a revision, and --revision is {revision}; give one of them")
    return Repository(name, revision or written or "main")


def resolve(repository: Repository) -> Snapshot:
    """Look up the commit and the files of a repository.

    Without a network it is the snapshot that an earlier download left in huggingface_hub's cache.

    Raises:
        InputError: the repository or revision is missing or not accessible; no network.
    """
    hub = _import_hub()
    with explained(repository.name, repository.revision):
        try:
            info = hub.HfApi().model_info(repository.name, revision=repository.revision)
        except Exception as error:
            if not is_network_error(error):
                raise
            with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
                folder = hub.snapshot_download(
                    repository.name,
                    revision=repository.revision,
                    local_files_only=True,
                    allow_patterns=list(_SETTINGS),
                )
                return _cached(repository, pathlib.Path(folder))
            raise
    files = [sibling.rfilename for sibling in info.siblings or ()]
    return Snapshot(repository, str(info.sha), files)


def _cached(repository: Repository, folder: pathlib.Path) -> Snapshot:
    files = sorted(path.name for path in folder.iterdir())
    return Snapshot(repository, folder.name, files, folder)


def download(
    snapshot: Snapshot, kinds: Kinds = hf_files.KINDS, *, progress: bool = True
) -> pathlib.Path:
    """Download the files that a conversion needs; return their folder in huggingface_hub's cache.

    What is there already is not downloaded again. Within a call a broken connection is resumed; a
    later call begins with the files that are not whole.

    Args:
        snapshot: as resolved.
        kinds: of the weights: `hf_files.KINDS` or `adapter.KINDS`.
        progress: show bars on stderr.

    Raises:
        InputError: it holds no weights, or cannot be downloaded; the disk is full.
    """
    repository = snapshot.repository
    files = _needed_files(snapshot, kinds)
    if snapshot.folder:
        return snapshot.folder
    hub = _import_hub()
    with explained(repository.name, repository.revision), _bars(progress):
        # By its branch, not by the commit: it is then found without a network too.
        folder = hub.snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=files
        )
    if pathlib.Path(folder).name != snapshot.commit:
        raise InputError(f"{repository} was changed during the download; run it again")
    return pathlib.Path(folder)


def fetch(
    src: str, revision: str | None = None, kinds: Kinds = hf_files.KINDS
) -> tuple[pathlib.Path, dict[str, str]]:
    """Return the folder that a source names, downloaded if it must be, and what the manifest says.

    Args:
        src, revision: see `parse`.
        kinds: see `download`.

    Raises:
        InputError: see `parse`, `resolve` and `download`.
    """
    repository = parse(src, revision)
    if repository is None:
        folder = pathlib.Path(src).expanduser()
        return folder, {"folder": folder.resolve().name}
    snapshot = resolve(repository)
    return download(snapshot, kinds), snapshot.describe()


def _needed_files(snapshot: Snapshot, kinds: Kinds) -> list[str]:
    """Return the files that a conversion reads; .bin files only if there are no safetensors."""
    files = [name for name in snapshot.files if "/" not in name]
    settings = [name for name in files if name in _SETTINGS]
    for stem, suffix in kinds:
        whole, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
        if whole in files:
            return [*settings, whole]
        if shards := fnmatch.filter(files, f"{stem}-*{suffix}"):
            return [*settings, *shards, *({index} & {*files})]
    if kinds == hf_files.KINDS:
        refuse_names(files, str(snapshot.repository))
    expected = " or ".join(f"{stem}*{suffix}" for stem, suffix in kinds)
    raise InputError(
        f"{snapshot.repository} has no {expected} (it has {abbreviate(files) or 'no files'}); name "
        "a repository that has"
    )


def _import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise InputError(
            "downloading needs huggingface_hub; install the hub extra: pip install 'llama_jax[hub]'"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Show huggingface_hub's progress bars, or hide them for a while."""
    from huggingface_hub import utils

    if progress or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
