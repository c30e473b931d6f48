"""Line: a request of a batch, in one of two formats, on its way to a line of output."""

import collections
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from llama_jax.card import contract
from llama_jax.engine.line_seeds import line_seed
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Result
from llama_jax.engine.stream import Stream, finish_in_order
from llama_jax.errors import InputError
from llama_jax.llama import Llama


class Form(Protocol):
    """A line's request in one of the formats; it is made from the line's fields and the model.

    `custom_id` and `metadata` are not among these fields.
    """

    @property
    def requests(self) -> Sequence[GenerationRequest]:
        """One for each choice."""
        ...

    @property
    def ignored(self) -> Sequence[str]:
        """The fields without effect."""
        ...

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """Return the fields of the output line, from the results of all requests."""
        ...


class CardForm:
    """A request in the model card's format, to which the parameters of this project are added.

    Raises:
        InputError: see `contract.check_extended`.
    """

    def __init__(self, fields: Any, llm: Llama):
        card = contract.check_extended(fields)
        self.requests = [card.request()]
        self.ignored = card.ignored + ["stream"] * card.stream

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """Return the result as the command line's JSON has it."""
        return {"result": results[0].to_dict()}


def _set_seed(fields: Any, seed: int) -> None:
    """Give a request in the card's format a seed, unless it has one."""
    if isinstance(fields, dict):
        fields.setdefault("seed", seed)


class Format(NamedTuple):
    """A format of lines."""

    make: Callable[[Any, Llama], Form]
    """Read a line's fields."""
    refusal: Callable[[Exception], dict[str, Any]] = lambda error: {"error": str(error)}
    """Return the fields of the output line of an error."""
    needs_id: bool = False
    """Whether each line has a `custom_id`."""
    set_seed: Callable[[Any, int], None] = lambda fields, seed: None
    """Write a seed into a line's fields that have none; the default: nothing is drawn."""


CARD = Format(CardForm, set_seed=_set_seed)


class Line:
    """A line of input on its way to a line of output.

    Args:
        number: from 1.
        text: as it is in the file.
        ids: the lines of the `custom_id`s so far.
        llm: the model.
        format_of: returns the format of a line's fields.
        seed: the batch's, from which a line without one gets its own; see `line_seed`.
    """

    def __init__(
        self,
        number: int,
        text: bytes,
        ids: dict[str | int, int],
        llm: Llama,
        format_of: Callable[[Any], Format],
        seed: int = 0,
    ):
        self.head = head(number, text)
        self._seed = line_seed(seed, number, self.head["sha256"])
        self._format = CARD
        self._form: Form | None = None
        self._error: InputError | None = None
        self._streams: list[Stream] = []
        self.results: list[Result] = []
        try:
            fields = parse(text)
            self._format = format_of(fields)
            self._read(fields, number, ids, llm)
        except InputError as error:
            self._error = error
        self.waiting = 1 if self._form is None else len(self._form.requests)
        """Generations that have not ended; an error counts as one."""

    def submit(self, index: int, llm: Llama) -> tuple["Line", Stream | None]:
        """Submit one of its generations; if it cannot be, all of them end."""
        if self._form is None or self._error is not None:
            return self, None
        try:
            self._streams.append(llm.start(self._form.requests[index]))
        except InputError as error:
            self._error = error
            for stream in self._streams:
                stream.close()
            return self, None
        return self, self._streams[-1]

    def output(self) -> dict[str, Any]:
        """Return the line of output."""
        head = self.head
        if self._form is not None:
            head = head | {"ignored": list(self._form.ignored)}
        if self._error is not None or self._form is None:
            assert self._error is not None
            return head | self._format.refusal(self._error)
        return head | self._form.answer(self.results)

    def _read(self, fields: Any, number: int, ids: dict[str | int, int], llm: Llama) -> None:
        if isinstance(fields, dict):
            given = {n: fields[n] for n in ("custom_id", "metadata") if fields.get(n) is not None}
            self.head |= given
            fields.pop("metadata", None)
        if take_id(fields, ids, number) is None and self._format.needs_id:
            raise InputError("custom_id is missing, expected a string that names this request")
        self._format.set_seed(fields, self._seed)
        self._form = self._format.make(fields, llm)


def answer_lines(lines: Iterable[Line], llm: Llama) -> Iterator[Line]:
    """Generate for lines, as many at once as there are slots; yield each when it has ended, in
    order."""
    submissions = (
        functools.partial(line.submit, i, llm) for line in lines for i in range(line.waiting)
    )
    for line, stream in finish_in_order(llm.engine, submissions):
        if stream is not None:
            collections.deque(stream, maxlen=0)
            line.results.append(stream.result)
        line.waiting -= 1
        if not line.waiting:
            yield line


def refused_row(number: int, text: bytes, error: InputError) -> dict[str, Any]:
    """Return the line of output of a line that cannot be answered, whatever is in it."""
    row, refuse = head(number, text), CARD.refusal
    try:
        fields = parse(text)
        if isinstance(fields, dict):
            row |= {n: fields[n] for n in ("custom_id", "metadata") if fields.get(n) is not None}
        refuse = request_format(fields).refusal
    except InputError:  # it is no JSON either
        pass
    return row | refuse(error)


def encode_row(row: dict[str, Any]) -> bytes:
    """Return a line of output as it is in the file, without a line break."""
    # A field's name may have a lone surrogate, which UTF-8 cannot encode.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")


def request_format(fields: Any) -> Format:
    """Return the format of a request: OpenAI's, or the model card's."""
    if not isinstance(fields, dict) or {"method", "url", "body"}.isdisjoint(fields):
        return CARD
    openai = _openai_module()
    return Format(openai.OpenAIForm, openai.refusal, needs_id=True, set_seed=openai.set_seed)


def head(number: int, line: bytes) -> dict[str, Any]:
    """Return what a line of output begins with: which request it answers."""
    return {"line": number, "sha256": hashlib.sha256(line.strip()).hexdigest()}


def parse(text: bytes) -> Any:
    """Parse the JSON of a line."""
    return contract.parse_body(text, "the request")


def take_id(fields: Any, ids: dict[str | int, int], number: int) -> str | int | None:
    """Remove a line's `custom_id` from its fields, record its line and return it.

    Raises:
        InputError: it is no string and no integer, or an earlier line has it.
    """
    value = fields.pop("custom_id", None) if isinstance(fields, dict) else None
    if value is None:
        return None
    if type(value) not in (str, int):
        raise InputError(f"custom_id is {value!r:.40}, expected a string or an integer")
    if ids.setdefault(value, number) != number:
        raise InputError(
            f"custom_id is {value!r:.40}, which line {ids[value]} has too, expected one of its own"
        )
    return value


def _openai_module() -> Any:
    """Return the module that knows OpenAI's format.

    Raises:
        InputError: it needs what is not installed.
    """
    try:
        from llama_jax.server.openai import batch
    except ImportError as error:
        raise InputError(
            f"a request in OpenAI's format needs {error.name}, which is not installed; pip install "
            "'llama_jax[serve]'"
        ) from None
    return batch
