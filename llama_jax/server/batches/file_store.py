"""FileStore: the files that clients have uploaded, and those that batches have written."""

import errno
import hashlib
import secrets
import time
from typing import Any, BinaryIO

from llama_jax.server.batches.folder import Folder
from llama_jax.server.batches.refusals import FILE_IN_USE, NO_FILE, STORAGE_FULL
from llama_jax.server.batches.settings import BatchSettings
from llama_jax.server.errors import ApiError

QUEUED = "workers_ai"
"""The purpose of a file that Workers AI's queue has; OpenAI's routes do not have it."""

_IN_USE = "SELECT id FROM batches WHERE input_file_id = ? AND ended_at IS NULL"


class FileStore:
    """Files by their ids; any thread may use it.

    Args:
        folder: where they are.
        settings: how many bytes are kept, and for how long.
    """

    def __init__(self, folder: Folder, settings: BatchSettings):
        self.folder, self._settings = folder, settings
        self._database = folder.database
        folder.keep_only({row["id"] for row in self._database.rows("SELECT id FROM files")})

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files, and of the answers that no file has yet."""
        row = self._database.row(
            "SELECT (SELECT coalesce(sum(bytes), 0) FROM files)"
            " + (SELECT coalesce(sum(answer_bytes), 0) FROM batches) AS bytes"
        )
        assert row is not None
        return row["bytes"]

    def check_room(self, size: int) -> None:
        """Check that there is room for another file.

        Raises:
            ApiError: there is none.
        """
        limit, stored = self._settings.max_stored_bytes, self.stored_bytes
        if stored + size > limit:
            raise ApiError(
                *(STORAGE_FULL, f"{stored:,} bytes of at most {limit:,} are stored"),
                headers={"x-should-retry": "false"},
            )

    def add(
        self, source: BinaryIO, size: int, purpose: str, filename: str, keep_s: float | None = None
    ) -> dict[str, Any]:
        """Store a file; return its row.

        Args:
            source: an open file.
            size: its bytes.
            purpose: OpenAI's name of what it is for, or QUEUED.
            filename: the client's name of it.
            keep_s: how long it is kept; None: as the settings say.

        Raises:
            ApiError: there is no room for it.
        """
        self.check_room(size)
        file_id = f"file-{secrets.token_hex(16)}"
        try:
            size = self.folder.copy(file_id, source)
        except OSError as error:
            raise ApiError(STORAGE_FULL, error.strerror or error) from error
        keep_s = self._settings.keep_s if keep_s is None else min(keep_s, self._settings.keep_s)
        self.enter(file_id, size, purpose, filename, keep_s)
        row = self._database.row("SELECT * FROM files WHERE id = ?", file_id)
        assert row is not None
        return row

    def enter(self, file_id: str, size: int, purpose: str, filename: str, keep_s: float) -> None:
        """Enter a file that is in the folder; nothing happens if it is entered already."""
        now = int(time.time())
        values = (file_id, purpose, filename, size, now, int(now + keep_s))
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO files (id, purpose, filename, bytes, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )

    def get(self, file_id: str) -> dict[str, Any]:
        """Return a file's row.

        Raises:
            ApiError: there is no such file.
        """
        row = self._database.row(
            "SELECT * FROM files WHERE id = ? AND purpose != ?", file_id, QUEUED
        )
        if row is None:
            raise ApiError(NO_FILE, file_id)
        return row

    def page(
        self, after: str | None, limit: int, purpose: str | None, newest_first: bool
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return a page of rows, and whether there are more.

        Raises:
            ApiError: there is no file `after`.
        """
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where, values = ["purpose != ?"], [QUEUED]
        if purpose is not None:
            where, values = [*where, "purpose = ?"], [*values, purpose]
        if after is not None:
            where = [*where, f"number {sign} ?"]
            values = [*values, self.get(after)["number"]]
        rows = self._database.rows(
            f"SELECT * FROM files WHERE {' AND '.join(where)} ORDER BY number {order} LIMIT ?",
            *values,
            limit + 1,
        )
        return rows[:limit], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            ApiError: there is no such file, or a batch that has not ended reads it.
        """
        self.get(file_id)
        if (batch := self._database.row(_IN_USE, file_id)) is not None:
            raise ApiError(
                *(FILE_IN_USE, file_id, batch["id"]), headers={"x-should-retry": "false"}
            )
        self.remove(file_id)

    def remove(self, file_id: str) -> None:
        """Remove a file and its row."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.folder.remove(file_id)

    def read_line(self, batch: dict[str, Any], line: dict[str, Any]) -> bytes:
        """Return a line of a batch's input, by both rows.

        Raises:
            OSError: it cannot be read, or is not the one that was checked.
        """
        text = self.folder.read(batch["input_file_id"], line["start"], line["size"])
        if hashlib.sha256(text.strip()).hexdigest() != line["sha256"]:
            raise OSError(errno.EIO, "its bytes are not those that were checked")
        return text

    def sweep(self) -> int:
        """Remove what has expired, unless a batch reads it; return how many files."""
        expired = [
            row["id"]
            for row in self._database.rows(
                "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN"
                " (SELECT input_file_id FROM batches WHERE ended_at IS NULL)",
                int(time.time()),
            )
        ]
        for file_id in expired:
            self.remove(file_id)
        return len(expired)
