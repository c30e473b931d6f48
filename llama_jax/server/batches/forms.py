"""Forms: how a line of a batch is read, and how its answer is written."""

import hashlib
from collections.abc import Sequence
from typing import Any

from llama_jax.card import contract
from llama_jax.engine.line_seeds import line_seed
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Result
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.server.batches.batch_store import OPENAI
from llama_jax.server.errors import to_api_error
from llama_jax.server.openai.batch import OpenAIForm, refusal


class OpenAILine:
    """A line of OpenAI's batches.

    Its rows are a function of the batch, the line and the tokens: a line that is answered again
    after a restart has the same bytes. So ids are derived, and what the prefix cache held, which
    depends on what else ran, is counted for the whole batch only.

    Args:
        batch: the batch's row.
        line: the line's.
    """

    def __init__(self, batch: dict[str, Any], line: dict[str, Any]):
        self._batch, self._line = batch, line
        self._form: OpenAIForm | None = None

    def read(self, text: bytes, llm: Llama, models: Sequence[str]) -> None:
        """Read the line.

        Raises:
            InputError: the request is wrong.
        """
        fields = contract.parse_body(text, "the line")
        if not isinstance(fields, dict) or not isinstance(body := fields.get("body"), dict):
            raise InputError("the line has no body, expected an object: the request")
        if body.get("seed") is None:
            body["seed"] = _seed(self._batch, self._line)
        fields.pop("custom_id", None)
        self._form = OpenAIForm(fields, llm, models)

    @property
    def requests(self) -> Sequence[GenerationRequest]:
        """One for each choice."""
        return [] if self._form is None else self._form.requests

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """Return the row of its answer."""
        assert self._form is not None
        row = self._form.answer(results)
        body = row["response"]["body"]
        body["created"] = self._batch["created_at"]
        body["id"] = f"{body['id'].partition('-')[0]}-{self._id('response')}"
        del body["usage"]["prompt_tokens_details"]
        return self._named(row)

    def failure(self, error: Exception) -> dict[str, Any]:
        """Return the row of an error."""
        return self._named(refusal(error))

    def unanswered(self, code: str, message: str) -> dict[str, Any]:
        """Return the row of a line that nobody answered."""
        error = {"code": code, "message": message}
        return self._named({"response": None, "error": error})

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["response"] is not None:
            row["response"]["request_id"] = self._id("request")
        head = {"id": f"batch_req_{self._id('line')}", "custom_id": self._line["custom_id"]}
        return head | {"response": row["response"], "error": row["error"]}

    def _id(self, what: str) -> str:
        text = f"{self._batch['id']} {self._line['number']} {what}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class WorkersAILine:
    """A request of Workers AI's queue.

    Args:
        batch: the batch's row.
        line: the line's; its number is one more than the request's id.
    """

    def __init__(self, batch: dict[str, Any], line: dict[str, Any]):
        self._batch, self._line = batch, line
        self._reference: Any = None
        self._ignored: list[str] = []
        self.requests: list[GenerationRequest] = []
        """The one generation; none if it is wrong."""

    def read(self, text: bytes, llm: Llama, models: Sequence[str]) -> None:
        """Read the request.

        Raises:
            InputError: it is wrong.
        """
        fields = contract.parse_body(text, "the request")
        if isinstance(fields, dict):
            self._reference = fields.pop("external_reference", None)
        card = contract.check(fields)
        card.fields.setdefault("seed", _seed(self._batch, self._line))
        self._ignored = card.ignored + ["stream"] * card.stream
        self.requests = [card.request()]

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """Return the row of its answer."""
        [result] = results
        usage = result.usage
        whole = {
            "response": result.response,
            "tool_calls": [],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
            },
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            "fingerprint": result.fingerprint,
        }
        warnings = [f"{name} has no effect: it was ignored" for name in self._ignored]
        return self._row(whole, True) | {"warnings": warnings + result.warnings}

    def failure(self, error: Exception) -> dict[str, Any]:
        """Return the row of an error."""
        refused = to_api_error(error)
        problem = {"code": refused.kind.code, "message": f"AiError: {refused.text}"}
        return self._row({}, False) | {"errors": [problem]}

    def unanswered(self, code: str, message: str) -> dict[str, Any]:
        """Return the row of a request that nobody answered."""
        problem = {"code": 3007, "message": f"AiError: Ai: {message} ({code})"}
        return self._row({}, False) | {"errors": [problem]}

    def _row(self, result: dict[str, Any], success: bool) -> dict[str, Any]:
        head = {"id": self._line["number"] - 1, "result": result, "success": success}
        return head | {"external_reference": self._reference}


AnyLine = OpenAILine | WorkersAILine


def line_of(batch: dict[str, Any], line: dict[str, Any]) -> AnyLine:
    """Return a line of a batch in the form of the batch's kind."""
    return (OpenAILine if batch["kind"] == OPENAI else WorkersAILine)(batch, line)


def _seed(batch: dict[str, Any], line: dict[str, Any]) -> int:
    return line_seed(int(batch["seed"]), line["number"], line["sha256"])
