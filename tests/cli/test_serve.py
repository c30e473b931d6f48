"""The verb serve: its flags; tests/test_readme.py starts it, tests/server has the server."""

import pathlib
import sys

import pytest

from llama_jax.server import serve
from llama_jax.server.batches.settings import BatchSettings


@pytest.mark.parametrize(
    ("environment", "flags", "token"),
    [("", [], None), ("theirs", [], "theirs"), ("theirs", ["--api_token=ours"], "ours")],
)
def test_flags_reach_the_server(cli, monkeypatch, environment, flags, token):
    calls = []
    monkeypatch.setattr(serve, "serve", lambda load, **arguments: calls.append(arguments))
    monkeypatch.delenv("LLAMA_JAX_API_TOKEN", raising=False)
    if environment:
        monkeypatch.setenv("LLAMA_JAX_API_TOKEN", environment)
    flags = ["--host=::1", "--port=5", "--allowed_origins=https://a.b,*", "--timeout_s=9", *flags]
    flags += ["--max_queue_per_client=3", "--max_slots_per_client=2"]
    flags += ["--receipts=100", "--private", "--log_format=json"]
    assert cli("serve", "--insecure", *flags) == (0, "", "")
    assert calls == [
        {
            "host": "::1",
            "port": 5,
            "api_token": token,
            "allowed_origins": ("https://a.b", "*"),
            "insecure": True,
            "log_format": "json",
            "timeout_s": 9.0,
            "max_queue_per_client": 3,
            "max_slots_per_client": 2,
            "receipts": 100,
            "private_receipts": True,
            "signer": None,
            "batches": None,
        }
    ]


def test_flags_of_batches_reach_the_server(cli, monkeypatch):
    calls = []
    monkeypatch.setattr(serve, "serve", lambda load, **arguments: calls.append(arguments))
    flags = ["--batch_dir=a/b", "--batch_max_requests=5", "--batch_max_file_mb=2"]
    flags += ["--batch_max_stored_mb=3", "--batch_keep_days=0.5", "--batch_slots=4"]
    assert cli("serve", *flags) == (0, "", "")
    [call] = calls
    assert call["batches"] == BatchSettings(
        pathlib.Path("a/b"),
        max_requests=5,
        max_file_bytes=2 * 10**6,
        max_stored_bytes=3 * 10**6,
        keep_s=12 * 3600,
        slots=4,
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--host=0.0.0.0"], "0.0.0.0"),
        (["--api_token="], "api_token is empty, expected a secret"),
        (["--port=0", "--max_queue=-1"], "max_queue is -1, expected a whole number from 0"),
        (["--port=0", "--receipts=-1"], "receipts is -1, expected a whole number from 0"),
        (["--sign_key=none.pem"], "--sign_key=none.pem"),
        (["--port=0", "--batch_dir=x", "--batch_max_requests=0"], "batch_max_requests is 0"),
        (["--port=0", "--batch_dir=x", "--batch_slots=0"], "batch_slots is 0, expected a whole"),
        (["--timeout_s=0"], "timeout_s is 0.0, expected a positive number"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_2(mistake, flags, expected):
    assert expected in mistake("serve", *flags)


def test_a_missing_package_is_named_with_how_to_install_it(mistake, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("llama_jax.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn is not installed; pip install 'llama_jax[serve]'" in mistake("serve")
