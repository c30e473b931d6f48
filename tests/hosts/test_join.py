"""How processes are started, and who may connect."""

import contextlib
import pickle
import socket
import threading

import jax
import pytest

from llama_jax.errors import InputError
from llama_jax.hosts import link
from llama_jax.hosts.join import Launch, is_launched, join

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation, in which nothing was started yet
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, expected):
    assert is_launched(environment) == expected


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch("a:1"), "no num_processes and no process_id; give all of coordinator_address"),
        (Launch("a:1", 2), "no process_id; "),
        (Launch(None, 2, 0), "no coordinator_address; "),
        (Launch("a", 2, 0), "coordinator_address is 'a', expected HOST:PORT"),
        (Launch(":80", 2, 0), "coordinator_address is ':80', expected HOST:PORT"),
        (Launch("a:65536", 2, 0), "expected HOST:PORT"),
        (Launch("a:x", 2, 0), "expected HOST:PORT"),
        (Launch("a:1", 2, 2), "process_id is 2 of num_processes 2, expected 0 to"),
        (Launch("a:1", 0, 0), "process_id is 0 of num_processes 0"),
        (Launch("a:1", 2, -1), "process_id is -1"),
        (Launch("a:1", 2, 0, 0), "a timeout is 0 s, expected 1 or more"),
        (Launch("a:1", 2, 0, 9, -1), "a timeout is -1 s"),
    ],
)
def test_a_launch_that_is_wrong(launch, said):
    with pytest.raises(InputError, match=said):
        join(launch)


def test_a_stranger_is_turned_away(monkeypatch):
    """Who does not say the secret is not read: a message is a pickle."""
    published_once = threading.Event()
    published = []

    def spread(data):
        published.append(pickle.loads(data))
        published_once.set()
        return data

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(link, "_spread", spread)
    links = []
    accepting = threading.Thread(target=lambda: links.extend(link.connect_all("127.0.0.1", 30)))
    accepting.start()
    assert published_once.wait(30)
    [(port, secret, host)] = published
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 2, bytes(len(secret)) + (1).to_bytes(4)):
        with socket.create_connection((host, port), timeout=10) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    assert not links
    with socket.create_connection((host, port)) as connected:
        connected.sendall(secret + (1).to_bytes(4))
        accepting.join(30)
        [own] = links
        with contextlib.closing(link.Link(connected, 0)) as other, contextlib.closing(own):
            other.send({"a": [1]})
            assert (own.peer, own.host, own.receive()) == (1, "127.0.0.1", {"a": [1]})
            other.close()
            with pytest.raises(EOFError):
                own.receive()
