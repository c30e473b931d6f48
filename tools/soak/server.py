"""The server that is driven: a process with few descriptors, and what the system says of it."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import app

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOKEN = "soak"
"""What the server must want of its clients."""
SLOTS, QUEUE, SHARE, OWN, DESCRIPTORS = 8, 64, 16, 2, 256
"""`run.py serve` has 8 slots; two clients that fill their share leave half of the queue."""
END_S = 60
"""For what runs to end when there is no more traffic."""


class Server:
    """A server process.

    Args:
        folder: where its log goes.
    """

    def __init__(self, folder: pathlib.Path):
        command = [sys.executable, "run.py", "serve", "--port=0", f"--api_token={TOKEN}"]
        command += [f"--max_queue={QUEUE}", f"--max_queue_per_client={SHARE}"]
        command += [f"--max_slots_per_client={OWN}"]
        limited = ["bash", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "bash", *command]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(limited, cwd=ROOT, stderr=log)
        self.url = self._wait()

    def _wait(self) -> str:
        while self.process.poll() is None:
            if match := re.search(r"at (http://\S+)", self.log.read_text("utf-8")):
                return match[1]
            time.sleep(0.1)
        raise app.Error(f"the server ended: {self.log.read_text('utf-8')}")

    @property
    def rss_mib(self) -> float:
        """The memory that it holds."""
        match = re.search(r"VmRSS:\s+(\d+) kB", self._proc("status"))
        assert match
        return int(match[1]) / 1024

    @property
    def files(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def cpu_s(self) -> float:
        """The processor time that it has used; 0 once it has ended."""
        if self.process.poll() is not None:
            return 0
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _proc(self, name: str) -> str:
        return pathlib.Path(f"/proc/{self.process.pid}/{name}").read_text()

    def stop(self) -> int:
        """Signal it to stop; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Start a server, and see to it that it ends."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(pathlib.Path(folder))
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()
