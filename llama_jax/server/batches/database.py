"""Database: the SQLite database of a folder of batches.

Each change is one transaction in its log of changes (WAL). A process that is killed loses none that
has ended; a machine that loses its power may lose the last, and then repeats those lines.
"""

import contextlib
import pathlib
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import InputError

_VERSION = 1
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, purpose TEXT NOT NULL,
    filename TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL,
    endpoint TEXT NOT NULL, model TEXT NOT NULL, input_file_id TEXT NOT NULL, status TEXT NOT NULL,
    seed TEXT NOT NULL, metadata TEXT, output_expires_s INTEGER, created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL, in_progress_at INTEGER, finalizing_at INTEGER,
    completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelling_at INTEGER,
    cancelled_at INTEGER, ended_at INTEGER, output_file_id TEXT, error_file_id TEXT, errors TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, answer_bytes INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE lines (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL,
    sha256 TEXT NOT NULL, custom_id TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (batch, number)
) WITHOUT ROWID;
CREATE INDEX lines_left ON lines (batch, attempts, number) WHERE NOT done;
CREATE TABLE answers (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, ok INTEGER NOT NULL, text BLOB NOT NULL,
    UNIQUE (batch, number)
);
"""


class Database:
    """One connection, which all threads share in turns.

    Args:
        path: of the file; created if it is not there.

    Raises:
        InputError: it cannot be opened, is damaged, or is another version's.
    """

    def __init__(self, path: pathlib.Path):
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._prepare(path)
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used ({error}); name another folder, or move this file away and "
                "lose its batches"
            ) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction: all of its changes come to be, or none."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:  # an interrupt too: the next transaction must not continue it
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query."""
        with self._lock:
            return [dict(row) for row in self._connection.execute(sql, values)]

    def row(self, sql: str, *values: Any) -> dict[str, Any] | None:
        """Return the first row of a query, if it has one."""
        return next(iter(self.rows(sql, *values)), None)

    def shrink(self) -> None:
        """Give the disk back what deleted rows took."""
        with self._lock:
            self._connection.execute("PRAGMA incremental_vacuum").fetchall()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close it; it cannot be used any more."""
        with self._lock:
            self._connection.close()

    def _prepare(self, path: pathlib.Path) -> None:
        execute = self._connection.execute
        [version] = execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise InputError(
                f"{path} has version {version}, expected {_VERSION}; name another folder"
            )
        if not version:
            execute("PRAGMA auto_vacuum = INCREMENTAL")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        if not version:
            script = f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;"
            self._connection.executescript(script)
        execute("SELECT count(*) FROM lines").fetchone()
