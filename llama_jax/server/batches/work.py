"""Work: a line of a batch while the engine answers it."""

from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.engine.delivery import NotFiniteError
from llama_jax.engine.generation import Generation
from llama_jax.engine.refusals import EngineFailedError
from llama_jax.engine.result import Result
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.server.batches.forms import line_of
from llama_jax.server.batches.line_store import Answer
from llama_jax.server.compact_json import encode

CLIENT = "batches"
"""Whose requests they are, to the engine."""


class Work:
    """One line: its generations, and the answer that they make.

    Args:
        batch: the batch's row.
        line: the line's.
    """

    def __init__(self, batch: dict[str, Any], line: dict[str, Any]):
        self.batch, self.line = batch, line
        self.key: tuple[int, int] = batch["number"], line["number"]
        self._form = line_of(batch, line)
        self._generations: list[Generation] = []
        self._refusal: InputError | None = None

    @property
    def size(self) -> int:
        """How many generations it has."""
        return len(self._generations)

    @property
    def is_done(self) -> bool:
        """Whether they all have ended."""
        return all(generation.done for generation in self._generations)

    @property
    def engine_error(self) -> BaseException | None:
        """What ended one of them that is no fault of its request, as far as is known."""
        errors = [generation.error for generation in self._generations]
        return next(
            (e for e in errors if e is not None and not isinstance(e, NotFiniteError)), None
        )

    def start(
        self, text: bytes, llm: Llama, models: Sequence[str], on_end: Callable[[], None]
    ) -> None:
        """Submit its generations. What is wrong with its request becomes its answer.

        Args:
            text: the line.
            llm: the model.
            models: its names.
            on_end: called, in the engine's thread, when they have ended, and perhaps before.

        Raises:
            EngineFailedError: the engine works no more.
        """

        def on_change() -> None:
            if self.is_done:
                on_end()

        try:
            self._form.read(text, llm, models)
            for request in self._form.requests:
                generation = llm.engine.submit(request, on_change, client=CLIENT, background=True)
                self._generations.append(generation)
        except InputError as error:
            self._refusal = error
            self.cancel()
            self._generations.clear()
        except EngineFailedError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel them; their slots are free at the engine's next turn."""
        for generation in self._generations:
            generation.cancel()

    def answer(self) -> Answer | None:
        """Return its answer, an error included; None: it was cancelled, or the engine failed."""
        if self._refusal is not None:
            return self.failure(self._refusal)
        if not self._generations or self.size < len(self._form.requests):
            return None
        results: list[Result] = []
        for generation in self._generations:
            if isinstance(generation.error, NotFiniteError):
                return self.failure(generation.error)
            result = generation.result
            if result is None or result.finish_reason == "cancelled":
                return None
            results.append(result)
        prompt = sum(result.usage.prompt_tokens for result in results)
        cached = sum(result.usage.cached_tokens for result in results)
        completion = sum(result.usage.completion_tokens for result in results)
        return Answer(True, encode(self._form.answer(results)), prompt, cached, completion)

    def failure(self, error: Exception) -> Answer:
        """Return an error as its answer."""
        return Answer(False, encode(self._form.failure(error)))
