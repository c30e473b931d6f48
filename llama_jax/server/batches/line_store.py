"""LineStore: the lines of batches, what was tried, and the answers.

An answer and the mark that its line is done are one transaction, so a line is answered once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llama_jax.server.batches.database import Database

_PAGE = 256


class NewLine(NamedTuple):
    """A line of a batch's input."""

    number: int
    """From 1; empty lines count."""
    start: int
    size: int
    """Its bytes in the file."""
    sha256: str
    """Of its bytes without the white space around it."""
    custom_id: str | None


class Answer(NamedTuple):
    """What a line's answer is made of."""

    ok: bool
    """False: it is an error."""
    text: bytes
    """JSON, without the end of line."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class LineStore:
    """Lines by batch and number; any thread may use it.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database):
        self._database = database

    def clear(self, batch: int) -> None:
        """Remove a batch's lines and answers."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM lines WHERE batch = ?", (batch,))
            connection.execute("DELETE FROM answers WHERE batch = ?", (batch,))
            connection.execute("UPDATE batches SET answer_bytes = 0 WHERE number = ?", (batch,))

    def add(self, batch: int, lines: Sequence[NewLine]) -> None:
        """Add lines to a batch that is validated."""
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT INTO lines (batch, number, start, size, sha256, custom_id)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [(batch, *line) for line in lines],
            )

    def suspects(self) -> list[dict[str, Any]]:
        """Return the lines that were begun and not answered: one may be what ended the server."""
        return self._database.rows(
            "SELECT lines.* FROM lines JOIN batches ON batches.number = lines.batch WHERE NOT done"
            " AND attempts > 0 AND status = 'in_progress' ORDER BY batch, lines.number"
        )

    def next(self, batch: int) -> dict[str, Any] | None:
        """Return a batch's first line that was not begun."""
        return self._database.row(
            "SELECT * FROM lines WHERE batch = ? AND NOT done AND attempts = 0"
            " ORDER BY number LIMIT 1",
            batch,
        )

    def begin(self, batch: int, number: int) -> None:
        """Count an attempt, before it is made."""
        self._count(batch, number, 1)

    def give_back(self, batch: int, number: int) -> None:
        """Take back an attempt that was broken off by no fault of the line."""
        self._count(batch, number, -1)

    def finish(self, batch: int, number: int, answer: Answer) -> None:
        """Store a line's answer."""
        with self._database.transaction() as connection:
            done = connection.execute(
                "UPDATE lines SET done = 1 WHERE batch = ? AND number = ? AND NOT done",
                (batch, number),
            )
            if not done.rowcount:
                return
            connection.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?)", (batch, number, answer.ok, answer.text)
            )
            connection.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ?,"
                " answer_bytes = answer_bytes + ?, prompt_tokens = prompt_tokens + ?,"
                " cached_tokens = cached_tokens + ?, completion_tokens = completion_tokens + ?"
                " WHERE number = ?",
                (answer.ok, not answer.ok, len(answer.text), *answer[2:], batch),
            )

    @property
    def num_left(self) -> int:
        """Lines of all batches without an answer."""
        row = self._database.row("SELECT count(*) AS count FROM lines WHERE NOT done")
        assert row is not None
        return row["count"]

    def is_left(self, batch: int) -> bool:
        """Return whether a batch has lines without an answer."""
        sql = "SELECT 1 FROM lines WHERE batch = ? AND NOT done LIMIT 1"
        return self._database.row(sql, batch) is not None

    def left(self, batch: int) -> Iterator[dict[str, Any]]:
        """Yield a batch's lines without an answer, in order."""
        yield from self._pages("SELECT * FROM lines WHERE NOT done AND batch = ?", batch)

    def answers(self, batch: int, *ok: bool) -> Iterator[dict[str, Any]]:
        """Yield a batch's answers in order: those that are right, or errors, or both."""
        wanted = ", ".join(str(int(each)) for each in ok)
        yield from self._pages(f"SELECT * FROM answers WHERE ok IN ({wanted}) AND batch = ?", batch)

    def has_answers(self, batch: int, ok: bool) -> bool:
        """Return whether a batch has answers that are right, or errors."""
        sql = "SELECT 1 FROM answers WHERE batch = ? AND ok = ? LIMIT 1"
        return self._database.row(sql, batch, ok) is not None

    def _pages(self, query: str, batch: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a query in the order of the lines; few are in memory at a time."""
        last = 0
        sql = f"{query} AND number > ? ORDER BY number LIMIT {_PAGE}"
        while rows := self._database.rows(sql, batch, last):
            yield from rows
            last = rows[-1]["number"]

    def _count(self, batch: int, number: int, change: int) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE lines SET attempts = max(0, attempts + ?) WHERE batch = ? AND number = ?",
                (change, batch, number),
            )
