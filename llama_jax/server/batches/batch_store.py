"""BatchStore: the batches, from their creation until they are forgotten."""

import json
import secrets
import time
import uuid
from typing import Any

from llama_jax.server.batches.database import Database
from llama_jax.server.batches.refusals import BATCH_ENDED, NO_BATCH
from llama_jax.server.batches.settings import BatchSettings
from llama_jax.server.errors import ApiError

OPENAI, WORKERS_AI = "openai", "workers_ai"

ENDED = ("completed", "failed", "expired", "cancelled")
STATUSES = ("validating", "in_progress", "finalizing", "cancelling", "expiring", *ENDED)


class BatchStore:
    """Batches by their ids; any thread may use it.

    A batch is validating, in_progress, finalizing and then completed; or cancelling or expiring
    until its answers are written. Clients see `expiring` as `finalizing`.

    Args:
        database: where they are.
        settings: for how long they are worked on, and then kept.
    """

    def __init__(self, database: Database, settings: BatchSettings):
        self._database, self._settings = database, settings

    def create(
        self,
        kind: str,
        endpoint: str,
        model: str,
        input_file_id: str,
        *,
        seed: int | None = None,
        metadata: dict[str, str] | None = None,
        output_expires_s: int | None = None,
    ) -> dict[str, Any]:
        """Create a batch, which is to be validated; return its row.

        Args:
            kind: OPENAI or WORKERS_AI.
            endpoint: the route that answers each line.
            model: the name that the client calls the model by; "": each line has it.
            input_file_id: holds the lines.
            seed: decides those of lines without one; None: one is drawn.
            metadata: the client's.
            output_expires_s: how long the files of answers are kept.
        """
        now = int(time.time())
        batch_id = str(uuid.uuid4()) if kind == WORKERS_AI else f"batch_{secrets.token_hex(16)}"
        fields = {
            "id": batch_id,
            "kind": kind,
            "endpoint": endpoint,
            "model": model,
            "input_file_id": input_file_id,
            "status": "validating",
            "seed": str(secrets.randbits(53) if seed is None else seed),
            "metadata": None if metadata is None else json.dumps(metadata),
            "output_expires_s": output_expires_s,
            "created_at": now,
            "expires_at": int(now + self._settings.window_s),
        }
        names, places = ", ".join(fields), ", ".join("?" * len(fields))
        with self._database.transaction() as connection:
            connection.execute(
                f"INSERT INTO batches ({names}) VALUES ({places})", tuple(fields.values())
            )
        return self.get(batch_id, kind)

    def get(self, batch_id: str, kind: str = OPENAI) -> dict[str, Any]:
        """Return a batch's row.

        Raises:
            ApiError: there is no such batch.
        """
        row = self._database.row("SELECT * FROM batches WHERE id = ? AND kind = ?", batch_id, kind)
        if row is None:
            raise ApiError(NO_BATCH, batch_id)
        return row

    def page(self, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Return a page of OpenAI's batches, the latest first, and whether there are more.

        Raises:
            ApiError: there is no batch `after`.
        """
        before = 2**62 if after is None else self.get(after)["number"]
        rows = self._database.rows(
            "SELECT * FROM batches WHERE kind = ? AND number < ? ORDER BY number DESC LIMIT ?",
            *(OPENAI, before, limit + 1),
        )
        return rows[:limit], len(rows) > limit

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Begin to cancel a batch; return its row. One that is cancelled already stays so.

        Raises:
            ApiError: there is no such batch, or it has ended otherwise.
        """
        row = self.get(batch_id)
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ? WHERE id = ? AND"
                " status IN ('validating', 'in_progress')",
                (int(time.time()), batch_id),
            )
        row = self.get(batch_id)
        if row["status"] not in ("cancelling", "cancelled"):
            raise ApiError(
                *(BATCH_ENDED, batch_id, row["status"]), headers={"x-should-retry": "false"}
            )
        return row

    def with_status(self, *statuses: str) -> list[dict[str, Any]]:
        """Return the rows of all batches with one of some statuses, the oldest first."""
        places = ", ".join("?" * len(statuses))
        return self._database.rows(
            f"SELECT * FROM batches WHERE status IN ({places}) ORDER BY number", *statuses
        )

    def change(self, number: int, status: str, **fields: Any) -> None:
        """Give a batch another status, and note when."""
        now = int(time.time())
        if status in ENDED:
            fields["ended_at"] = now
        fields[f"{status}_at"] = now
        names = "".join(f", {name} = ?" for name in fields)
        with self._database.transaction() as connection:
            connection.execute(
                f"UPDATE batches SET status = ?{names} WHERE number = ?",
                (status, *fields.values(), number),
            )

    def begin(self, number: int, total: int) -> None:
        """Begin to answer a batch that is validated, unless it was cancelled meanwhile."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ?, total = ? WHERE"
                " number = ? AND status = 'validating'",
                (int(time.time()), total, number),
            )

    def finalize(self, number: int) -> None:
        """Begin to end a batch whose lines are done, unless it was cancelled meanwhile."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'finalizing', finalizing_at = ? WHERE number = ? AND"
                " status = 'in_progress'",
                (int(time.time()), number),
            )

    def expire(self) -> None:
        """Begin to end the batches whose time is up."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'expiring' WHERE expires_at <= ? AND status IN"
                " ('validating', 'in_progress')",
                (int(time.time()),),
            )

    def forgotten(self) -> list[dict[str, Any]]:
        """Return the rows of the batches that have been kept for long enough."""
        since = int(time.time() - self._settings.keep_s)
        return self._database.rows("SELECT * FROM batches WHERE ended_at <= ?", since)

    def remove(self, number: int) -> None:
        """Remove a batch and its answers."""
        with self._database.transaction() as connection:
            for table, column in (("answers", "batch"), ("lines", "batch"), ("batches", "number")):
                connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (number,))

    def count(self) -> dict[str, int]:
        """Return how many batches there are by status."""
        rows = self._database.rows("SELECT status, count(*) AS n FROM batches GROUP BY status")
        return {row["status"]: row["n"] for row in rows}
