"""An engine in a process of its own, spoken to over pipes; the other end is `engines/protocol`."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, BinaryIO

from benchmarks.cases import Engine

ROOT = pathlib.Path(__file__).parent.parent


class EngineError(Exception):
    """An engine failed or died; the message says how."""


class Worker:
    """One running engine."""

    def __init__(self, engine: Engine, log: BinaryIO, environment: dict[str, str] | None = None):
        self.engine = engine
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.engines.{engine.kind.removesuffix('-compile')}"],
            cwd=ROOT,
            env=os.environ | jax_settings() | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the orchestrator, which then ends its workers
        )

    def call(self, op: str, **arguments: Any) -> Any:
        """Run an operation and return its result."""
        assert self._process.stdin
        assert self._process.stdout
        line = ""
        try:
            print(json.dumps({"op": op, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it died before: reported below
        if not line:
            status = self._process.wait()
            killed = " (killed: perhaps out of memory)" if status == -9 else ""
            raise EngineError(f"ended with status {status} at {op}{killed}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{op}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):  # a request that was never read
                    pipe.close()


def jax_settings() -> dict[str, str]:
    """Return variables that let several JAX processes share a GPU, where the user set none."""
    wanted = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
    return {name: value for name, value in wanted.items() if name not in os.environ}
