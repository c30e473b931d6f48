"""Join: how the processes of one run find each other, before any of them looks for devices."""

import contextlib
import io
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from llama_jax.errors import InputError, printable
from llama_jax.hosts.ending import end_process
from llama_jax.hosts.link import Link, connect_all

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_LAST_PORT = 65535
_SLACK_S = 60
"""JAX waits so much longer than this package: at its own timeout it aborts the process."""


class Launch(NamedTuple):
    """How the processes are started; None: JAX asks the launcher."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, where the others find it."""
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout_s: int = 300
    """How long they wait for each other."""
    heartbeat_timeout_s: int = 100
    """After which JAX takes a process that does not answer for dead."""


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether SLURM, Open MPI or a TPU pod's launcher started this process beside others."""
    count = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if all(name in environment for name in _SLURM):
        count = environment.get("SLURM_NTASKS", "1")
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or (count.isdecimal() and int(count) > 1)


def join(launch: Launch) -> list[Link]:
    """Wait until all processes are there, and connect them; see `link.connect_all`.

    `jax.devices()` then has the devices of all.

    If they are not in time, the process says so and ends with status 2.

    Raises:
        InputError: the launch is incomplete or contradictory, or no launcher is known.
    """
    address, count, index, timeout_s, heartbeat_s = launch
    _check(launch)
    if index == 0 and address is not None:
        _check_port(int(address.rpartition(":")[2]))
    _keep_stdout()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _deadline(timeout_s, address):
            jax.distributed.initialize(
                address,
                count,
                index,
                # Else JAX would take one device a process under SLURM, whoever started it.
                cluster_detection_method=address and "deactivate",
                initialization_timeout=timeout_s + _SLACK_S,
                heartbeat_timeout_seconds=heartbeat_s,
            )
            return connect_all(address and address.rpartition(":")[0].strip("[]"), timeout_s)
    except (OSError, RuntimeError, ValueError) as error:
        said = printable(str(error).strip().partition("\n")[0])[:200]
        raise InputError(
            f"the processes cannot be joined ({said}); give coordinator_address, num_processes and "
            "process_id, or start them by SLURM, Open MPI or a TPU's launcher"
        ) from None


def _check(launch: Launch) -> None:
    """Refuse what JAX would refuse by a traceback, or time out on."""
    address, count, index, *timeouts = launch
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise InputError(f"no {' and no '.join(missing)}; give all of {', '.join(given)}, or none")
    if any(value < 1 for value in timeouts):
        raise InputError(f"a timeout is {min(timeouts)} s, expected 1 or more")
    if address is None or count is None or index is None:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= _LAST_PORT:
        raise InputError(
            f"coordinator_address is {address!r}, expected HOST:PORT of process 0, as in "
            "10.0.0.1:1234"
        )
    if not 0 <= index < count:
        raise InputError(
            f"process_id is {index} of num_processes {count}, expected 0 to num_processes - 1"
        )


def _check_port(port: int) -> None:
    """Refuse a port that is taken: JAX's coordinator would crash on it."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"coordinator_address names port {port}, on which process 0 cannot listen "
            f"({error.strerror}); choose another"
        ) from None


def _keep_stdout() -> None:
    """Drop what libraries print to file descriptor 1; `sys.stdout` writes to a copy of it.

    Gloo, the collectives of CPUs, prints there whenever devices connect.
    """
    if sys.stdout is None:  # `>&-` closes it
        return
    sys.stdout.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(os.dup(1), "w")),
        sys.stdout.encoding,
        sys.stdout.errors,
        line_buffering=bool(sys.stdout.line_buffering),
    )
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


@contextlib.contextmanager
def _deadline(timeout_s: float, address: str | None) -> Iterator[None]:
    """End the process unless the block ends in time; JAX would abort it, with a stack trace."""
    where = f" at {address}" if address else ""
    timer = threading.Timer(
        timeout_s,
        end_process,
        [
            2,
            f"error: the processes did not find each other{where} within {timeout_s} s; start "
            "them all, with the address of process 0, which the others must be able to reach",
        ],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
