"""Stream: an answer read piece by piece; reading it drives the engine."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llama_jax.engine.engine import Engine
from llama_jax.engine.generation import Generation
from llama_jax.engine.refusals import QueueFullError
from llama_jax.engine.result import Piece, Result

T = TypeVar("T")


class Stream:
    """Pieces of text as they are generated; `result` is there once the last was taken.

    While it waits for its own next piece, the engine works for all. A stream that is dropped before
    its end is cancelled.
    """

    def __init__(self, engine: Engine, generation: Generation, load_s: float = 0.0):
        self._engine, self._generation, self._load_s = engine, generation, load_s

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (piece := self.next_piece()) is not None:
            if piece.text:
                return piece.text
        raise StopIteration

    def next_piece(self) -> Piece | None:
        """Return the next piece, with its tokens; None: it was the last.

        Raises:
            Exception: what went wrong, if the generation failed.
        """
        while True:
            done = self._generation.done  # read first: the last piece comes before the end
            if piece := self._generation.take():
                return piece
            if done:
                if self._generation.error is not None:
                    self._generation.raise_error()
                return None
            self._engine.step(skip_if=lambda: self._generation.done or self._generation.unread)

    @property
    def done(self) -> bool:
        """Whether all is generated; it may not be read yet."""
        return self._generation.done

    @property
    def result(self) -> Result:
        """The whole result, equal to that of `generate`."""
        if self._generation.error is not None and not self._generation.unread:
            raise RuntimeError("the stream failed: it has no result") from self._generation.error
        if self._generation.result is None or self._generation.unread:
            raise RuntimeError("the stream has not been read to its end yet")
        timings = dataclasses.replace(self._generation.result.timings, load_s=self._load_s)
        return dataclasses.replace(self._generation.result, timings=timings)

    def close(self) -> None:
        """Cancel the rest."""
        self._generation.cancel()

    def __del__(self) -> None:
        self.close()


def read_all(stream: Stream) -> Result:
    """Read a stream to its end; return its result."""
    collections.deque(stream, maxlen=0)
    return stream.result


def finish_in_order(
    engine: Engine, submissions: Iterable[Callable[[], tuple[T, Stream | None]]]
) -> Iterator[tuple[T, Stream | None]]:
    """Work until every stream is done; yield them in order, each with its companion value.

    Args:
        engine: the streams'.
        submissions: each submits a request and returns a value with its stream, or with None if
            the request cannot be submitted. They are called one by one, early enough to keep every
            slot busy, and called again if other threads have filled the queue meanwhile.
    """
    source, waiting = iter(submissions), collections.deque[tuple[T, Stream | None]]()
    submit = None
    more = True

    def first_is_done() -> bool:
        return bool(waiting) and (waiting[0][1] is None or waiting[0][1].done)

    while more or waiting:
        if first_is_done():
            yield waiting.popleft()
        elif more and engine.has_room() and engine.queued < engine.executor.batch:
            submit = submit or next(source, None)
            more = submit is not None
            if submit is not None:
                with contextlib.suppress(QueueFullError):
                    waiting.append(submit())
                    submit = None
        else:  # with nothing of its own too: others may hold all the room
            engine.step(skip_if=first_is_done)
