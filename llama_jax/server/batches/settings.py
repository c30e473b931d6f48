"""BatchSettings: where batches are stored, and how much of them."""

import dataclasses
import pathlib

DAY_S = 24 * 3600

QUEUE_BYTES = 10 * 10**6
"""Workers AI's limit of the body that queues requests."""


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """The settings of a server's batches; the first two limits are OpenAI's."""

    folder: pathlib.Path
    """Holds all of them; of one server at a time."""
    max_requests: int = 50_000
    """Lines of one batch."""
    max_file_bytes: int = 200 * 10**6
    """Of one file that is uploaded."""
    max_stored_bytes: int = 10 * 10**9
    """Of all files and answers that are kept; beyond it, nothing new is taken."""
    keep_s: float = 30 * DAY_S
    """How long files, and batches that have ended, are kept."""
    window_s: float = DAY_S
    """In which a batch is to be answered; what is left of it then is not."""
    slots: int | None = None
    """The most slots that batches use at a time; None: all."""

    def problems(self) -> list[str]:
        """Return what is wrong with them."""
        found = [
            f"batch_{name} is {getattr(self, name)!r}, expected a positive number"
            for name in ("max_requests", "max_file_bytes", "max_stored_bytes", "keep_s", "window_s")
            if not getattr(self, name) > 0
        ]
        if self.slots is not None and self.slots < 1:
            found.append(f"batch_slots is {self.slots!r}, expected a whole number from 1")
        return found
