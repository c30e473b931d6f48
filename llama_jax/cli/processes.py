"""The processes of a run, as the flags or the launcher name them."""

import atexit
import sys
from collections.abc import Callable
from typing import Any

import jax

from llama_jax.cli.flags import FLAGS
from llama_jax.errors import InputError
from llama_jax.hosts.ending import end_process
from llama_jax.hosts.follower import follow
from llama_jax.hosts.join import Launch, is_launched, join
from llama_jax.hosts.leader import Leader

_leaders: list[Leader] = []


def leader() -> Leader | None:
    """Return what leads the other processes of this run; None: there are none."""
    return _leaders[0] if _leaders else None


def run_on_all(run: Callable[[], None]) -> None:
    """Run a verb; of several processes on the first, which the others follow."""
    given: dict[str, Any] = {name: FLAGS[name].value for name in Launch._fields}
    if not _is_distributed():
        for name in given:
            if FLAGS[name].present:
                raise InputError(
                    f"--{name} is given without --coordinator_address or --distributed; add one"
                )
        return run()
    links = join(Launch(**given))
    if jax.process_index() > 0:
        follow(links[0])
    _leaders.append(Leader(links))
    status = 1
    try:
        run()
        if sys.stdout is not None:  # `>&-` closes it
            sys.stdout.flush()
        status = 0
    except (InputError, OSError):
        status = 2
        raise
    finally:
        _leaders.pop().end(status)
        # At the interpreter's own exit JAX would wait for the others, which have ended.
        atexit.register(end_process, status)


def _is_distributed() -> bool:
    given = FLAGS.distributed
    return (FLAGS.coordinator_address is not None or is_launched()) if given is None else given
