"""Worker: the thread that has batches answered, by the slots that live requests leave."""

import logging
import queue
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

from llama_jax.engine.generation import Generation
from llama_jax.engine.refusals import EngineFailedError
from llama_jax.engine.request import make_request
from llama_jax.llama import Llama
from llama_jax.server.batches.batch_store import BatchStore
from llama_jax.server.batches.file_store import FileStore
from llama_jax.server.batches.finish import Finish
from llama_jax.server.batches.line_store import Answer, LineStore
from llama_jax.server.batches.refusals import LINE_FAILED, UNREADABLE_LINE
from llama_jax.server.batches.settings import BatchSettings
from llama_jax.server.batches.validation import Validation
from llama_jax.server.batches.work import CLIENT, Work
from llama_jax.server.errors import ApiError
from llama_jax.server.settings import Settings

MAX_ATTEMPTS = 2
"""A line that was begun so often and not answered gets an error: it may be what ends the engine."""

_SWEEP_S = 30.0
_RETRY_S = 5.0
"""After a failure of the disk."""

_LOGGER = logging.getLogger("llama_jax.server")


class Worker:
    """Validates batches, keeps slots busy with their lines, and ends them.

    A line that was begun before, and not answered, is alone among the work of batches: if it makes
    the engine fail again, no other line suffers. After a failure a request known to be right
    shows whether the device works; no line is begun before it does.

    Args:
        llm: the model.
        settings: the server's.
        batch_settings: the batches'.
        files, batches, lines, finish: where they are, and how they end.
    """

    def __init__(
        self,
        llm: Llama,
        settings: Settings,
        batch_settings: BatchSettings,
        files: FileStore,
        batches: BatchStore,
        lines: LineStore,
        finish: Finish,
    ):
        self._llm, self._settings, self._limits = llm, settings, batch_settings
        self._files, self._batches, self._lines = files, batches, lines
        self._finish = finish
        slots = llm.executor.batch
        self._slots = slots if batch_settings.slots is None else min(slots, batch_settings.slots)
        self._inbox: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._work: dict[tuple[int, int], Work] = {}
        self._probe: Generation | None = None
        self._validation: tuple[dict[str, Any], Validation, Iterator[None]] | None = None
        self._last: int = 0
        """The batch whose line was begun last: they take turns."""
        self._retry_at: dict[int, float] = {}
        self._swept_at = -_SWEEP_S
        self._stopping = False
        self.ended = {"completed": 0, "failed": 0}
        """Lines that got an answer or an error since the start."""

    def wake(self) -> None:
        """Make it look whether there is something to do; a signal's handler may call this."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Make it break its lines off and end; a signal's handler may call this."""
        self._stopping = True
        self.wake()

    def run(self) -> None:
        """Work until `stop`; the whole life of its thread."""
        while not self._stopping:
            try:
                busy = self._turn()
            except EngineFailedError:
                break
            except Exception:  # such as a full disk: nothing is lost, so it goes on
                _LOGGER.exception("batches pause for %.0f s", _RETRY_S)
                self._wait(_RETRY_S)
                continue
            if not busy:
                self._wait(_SWEEP_S)
        self._break_off()

    # A turn.

    def _turn(self) -> bool:
        """Do what there is to do; return whether there is more to do at once."""
        self._collect()
        if time.monotonic() >= self._swept_at + _SWEEP_S:
            self._finish.sweep()
            self._swept_at = time.monotonic()
        busy = self._validate()
        self._end_batches()
        while not self._stopping and self._begin_next():
            pass
        return busy

    def _validate(self) -> bool:
        """Check a slice of the oldest batch that is not checked; return whether there is more."""
        if self._validation is None:
            waiting = self._batches.with_status("validating")
            if not waiting:
                return False
            check = Validation(
                *(waiting[0], self._files.folder, self._lines),
                max_requests=self._limits.max_requests,
                max_line_bytes=self._settings.max_body_bytes,
            )
            self._validation = waiting[0], check, check.slices()
        batch, check, slices = self._validation
        try:
            next(slices)
        except StopIteration:
            self._validation = None
            if check.problems:
                self._finish.fail(batch, check.problems)
            else:
                self._batches.begin(batch["number"], check.total)
        except sqlite3.Error:  # it begins anew
            self._validation = None
            raise
        except Exception as error:  # whatever it is, other batches go on
            self._validation = None
            _LOGGER.exception("batch %s cannot be checked", batch["id"])
            message = f"The file cannot be checked: {type(error).__name__}"
            self._finish.fail(
                batch, [{"code": "server_error", "line": None, "message": message, "param": None}]
            )
        return True

    def _end_batches(self) -> None:
        """Break off what was cancelled or has expired; end what has no line in the engine."""
        for batch in self._batches.with_status("cancelling", "expiring", "finalizing"):
            number = batch["number"]
            if self._validation is not None and self._validation[0]["number"] == number:
                self._validation = None
            own = [work for key, work in self._work.items() if key[0] == number]
            for work in own:
                work.cancel()
            if own or time.monotonic() < self._retry_at.get(number, 0):
                continue
            try:
                self._finish.end(batch)
            except Exception as error:  # whatever it is, the others go on
                _LOGGER.error("batch %s cannot be ended yet: %s", batch["id"], error)
                self._retry_at[number] = time.monotonic() + _RETRY_S

    # Lines.

    def _begin_next(self) -> bool:
        """Begin the next line, if there is one and a slot for it; return whether it was begun."""
        generations = sum(work.size for work in self._work.values())
        if self._probe is not None or max(generations, len(self._work)) >= self._slots:
            return False
        if any(work.line["attempts"] for work in self._work.values()):
            return False  # that one is to be alone
        active = {row["number"]: row for row in self._batches.with_status("in_progress")}
        suspects = [
            line
            for line in self._lines.suspects()
            if line["batch"] in active and (line["batch"], line["number"]) not in self._work
        ]
        if suspects:
            if not self._work:
                self._begin(active[suspects[0]["batch"]], suspects[0])
            return not self._work
        later = [number for number in active if number > self._last]
        for number in [*later, *(number for number in active if number <= self._last)]:
            if (line := self._lines.next(number)) is not None:
                self._last = number
                self._begin(active[number], line)
                return True
            if not self._lines.is_left(number):
                self._batches.finalize(number)
                self.wake()
        return False

    def _begin(self, batch: dict[str, Any], line: dict[str, Any]) -> None:
        """Begin a line; one that cannot be begun is answered by an error."""
        work = Work(batch, line)
        if line["attempts"] >= MAX_ATTEMPTS:
            return self._answer_by_error(work, ApiError(LINE_FAILED, MAX_ATTEMPTS))
        try:
            text = self._files.read_line(batch, line)
        except OSError as error:
            reason = ApiError(UNREADABLE_LINE, line["number"], error.strerror or error)
            return self._answer_by_error(work, reason)
        self._lines.begin(*work.key)
        self._work[work.key] = work
        work.start(text, self._llm, self._settings.models, self.wake)
        if work.is_done:  # its request is wrong, or empty
            self.wake()
        return None

    def _answer_by_error(self, work: Work, error: Exception) -> None:
        self._store(work, work.failure(error))

    def _store(self, work: Work, answer: Answer) -> None:
        self._lines.finish(*work.key, answer)
        self.ended["completed" if answer.ok else "failed"] += 1

    def _collect(self) -> None:
        """Store the answers that are whole; find out whose fault a failure is."""
        if self._probe is not None and self._probe.done:
            if self._probe.error is not None:
                _LOGGER.error("the engine fails without batches too: %s", self._probe.error)
                self._wait(1.0)
                self._start_probe()
            else:
                self._probe = None
        for key, work in list(self._work.items()):
            if not work.is_done:
                continue
            try:
                answer = work.answer()
            except Exception as error:  # a fault of ours: the other lines go on
                _LOGGER.exception("batch %s, line %d has no answer", work.batch["id"], key[1])
                answer = work.failure(error)
            if answer is not None:
                self._store(work, answer)
            elif work.engine_error is not None:
                where = work.batch["id"], key[1]
                _LOGGER.error("batch %s, line %d: %s", *where, work.engine_error)
                work.cancel()
                self._start_probe()
            del self._work[key]

    def _start_probe(self) -> None:
        request = make_request(prompt_tokens=[1], max_tokens=1, seed=1, temperature=0.0)
        engine = self._llm.engine
        self._probe = engine.submit(request, self.wake, client=CLIENT, background=True)

    def _break_off(self) -> None:
        """Store what is whole; take the attempts of the rest back, which was no fault of theirs."""
        try:
            for key, work in self._work.items():
                if work.is_done and (answer := work.answer()) is not None:
                    self._store(work, answer)
                elif work.engine_error is None:
                    self._lines.give_back(*key)
        except sqlite3.Error:
            _LOGGER.exception("batches end without their last answers, which come again")
        finally:
            for work in self._work.values():
                work.cancel()
            if self._probe is not None:
                self._probe.cancel()

    def _wait(self, seconds: float) -> None:
        """Wait until something comes, and take all of it."""
        try:
            self._inbox.get(timeout=seconds)
            while True:
                self._inbox.get_nowait()
        except queue.Empty:
            pass
