"""Batches: the stored files and batches of one server, and the thread that works on them."""

import io
import threading
from typing import Any

from llama_jax.llama import Llama
from llama_jax.server.batches.batch_store import WORKERS_AI, BatchStore
from llama_jax.server.batches.file_store import QUEUED, FileStore
from llama_jax.server.batches.finish import Finish
from llama_jax.server.batches.folder import Folder
from llama_jax.server.batches.line_store import LineStore
from llama_jax.server.batches.settings import BatchSettings
from llama_jax.server.batches.worker import Worker
from llama_jax.server.compact_json import encode
from llama_jax.server.settings import Settings


class Batches:
    """All that a server keeps of batches.

    Args:
        llm: the model.
        settings: the server's.
        batch_settings: those of its batches.

    Raises:
        InputError: the folder cannot be used, or another server has it.
    """

    def __init__(self, llm: Llama, settings: Settings, batch_settings: BatchSettings):
        self.settings = batch_settings
        self._folder = Folder(batch_settings.folder)
        database = self._folder.database
        self.files = FileStore(self._folder, batch_settings)
        self.batches = BatchStore(database, batch_settings)
        self.lines = LineStore(database)
        finish = Finish(self.files, self.batches, self.lines, batch_settings, llm)
        self.worker = Worker(
            llm, settings, batch_settings, self.files, self.batches, self.lines, finish
        )
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._ready, self._stopping = threading.Event(), False

    def start(self) -> None:
        """Start the thread, which waits for `go`."""
        self._thread.start()

    def go(self) -> None:
        """Let the work begin: the engine is warm."""
        self._ready.set()

    def stop(self) -> None:
        """Break the work off; a signal's handler may call this."""
        self._stopping = True
        self.worker.stop()

    def join(self, seconds: float) -> bool:
        """Wait after `stop` for the thread to end, and close; return whether it did."""
        self._ready.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        self._folder.close()
        return True

    def queue(self, requests: list[Any], model: str) -> dict[str, Any]:
        """Queue requests of Workers AI; return the batch's row.

        Raises:
            ApiError: there is no room for them.
        """
        lines = b"".join(encode(request) + b"\n" for request in requests)
        file = self.files.add(io.BytesIO(lines), len(lines), QUEUED, "requests.jsonl")
        row = self.batches.create(WORKERS_AI, "", model, file["id"])
        self.worker.wake()
        return row

    def _run(self) -> None:
        self._ready.wait()
        if not self._stopping:
            self.worker.run()
