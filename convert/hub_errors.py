"""What goes wrong with the Hugging Face hub, in one line with a remedy."""

import contextlib
import difflib
import errno
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import InputError, innermost_package

_CLIENTS = ("httpcore", "httpcore2", "httpx", "httpx2", "hf_xet", "requests", "urllib3")
_AGAIN = "then run the same command again: whole files are kept"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextlib.contextmanager
def explained(name: str, revision: str) -> Iterator[None]:
    """Turn huggingface_hub's errors within the block into one line each.

    Args:
        name: of the repository.
        revision: of it.

    Raises:
        InputError: in place of them. Errors of our own pass.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = _message(name, revision, _cause(error))
        if message is None:
            raise
        raise InputError(message) from error


def is_network_error(error: BaseException) -> bool:
    """Tell whether the hub was not reached, or must not be (HF_HUB_OFFLINE)."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return False
    client = any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)
    return client or isinstance(error, ConnectionError)


def _cause(error: BaseException) -> BaseException:
    """Return the error that made huggingface_hub fall back to its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def _message(name: str, revision: str, error: BaseException) -> str | None:
    """Describe an error; None: it is not the hub's."""
    from huggingface_hub import constants, errors

    said = " ".join(str(error).split())[:200]
    match error:
        case errors.GatedRepoError():
            return (
                f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, then {_LOGIN}, "
                "with the account that has access"
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r}{_near_revisions(name, revision)}"
        case errors.RepositoryNotFoundError():
            return (
                f"{name} is neither a folder on this machine nor a repository that you can see on "
                f"{constants.ENDPOINT}{_near_names(name)}; if it is private, {_LOGIN}"
            )
        case errors.HFValidationError():
            return f"{name} is no name of a repository ({said}); expected ORG/NAME"
        case errors.OfflineModeIsEnabled():
            return f"{name} is not in {constants.HF_HUB_CACHE}; unset HF_HUB_OFFLINE to download it"
        case errors.HfHubHTTPError():
            return _http_message(name, error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return (
                f"the disk of {constants.HF_HUB_CACHE} is full; make room or set HF_HOME to a "
                f"folder on another disk, {_AGAIN}"
            )
    if is_network_error(error) or innermost_package(error) in ("huggingface_hub", *_CLIENTS):
        return (
            f"{name} cannot be downloaded from {constants.ENDPOINT} ({type(error).__name__}: "
            f"{said}); check the network, {_AGAIN}"
        )
    return None


def _http_message(name: str, error: Any) -> str:
    status, url = error.response.status_code, str(error.response.url).partition("?")[0]
    remedy = {
        401: f"the login is not valid: {_LOGIN}",
        403: "the login may not read this: give its token the permission to read the repository",
        429: f"too many requests: wait some minutes, {_AGAIN}",
    }.get(status, f"wait until the server has recovered, {_AGAIN}")
    return f"{name} cannot be downloaded: {url} answered with HTTP status {status}; {remedy}"


def _near_revisions(name: str, revision: str) -> str:
    """Name the branches and tags that a revision may be meant as."""
    with contextlib.suppress(Exception):  # the hint is worth no second error
        from huggingface_hub import HfApi

        refs = HfApi().list_repo_refs(name)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        near = difflib.get_close_matches(revision, names, n=1)
        return f"; did you mean {near[0]}?" if near else f"; it has {', '.join(names[:8])}"
    return "; check it on the repository's page"


def _near_names(name: str) -> str:
    """Name the repository of the same owner that a name may be meant as."""
    with contextlib.suppress(Exception):
        from huggingface_hub import HfApi

        names = [model.id for model in HfApi().list_models(author=name.partition("/")[0])]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        return f" (did you mean {near[0]}?)" if near else ""
    return ""
