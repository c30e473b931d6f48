"""OpenAI's batches: a line of input, and the line of output for it."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from llama_jax.card import schemas as card
from llama_jax.engine.result import Result
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.server.errors import ApiError, to_api_error
from llama_jax.server.openai.requests import parse_chat, parse_completion
from llama_jax.server.openai.responses import ChatChoices, CompletionChoices, whole_body
from llama_jax.server.settings import MAX_ANSWERS

_PARSERS = {"/v1/chat/completions": parse_chat, "/v1/completions": parse_completion}
_KNOWN = {"method", "url", "body"}


class OpenAIForm:
    """A request in the format of OpenAI's batches: `method`, `url` and the `body` for this route.

    Args:
        fields: those of the line, without `custom_id` and `metadata`.
        llm: the model.
        models: its names.

    Raises:
        InputError: another method or route, or what `parse_chat` refuses; its cause may be an
            ApiError.
    """

    def __init__(self, fields: dict[str, Any], llm: Llama, models: Sequence[str] = (card.MODEL,)):
        method, url, body = (fields.get(name) for name in ("method", "url", "body"))
        if method != "POST":
            raise InputError(f"method is {method!r:.40}, expected 'POST'")
        if not isinstance(url, str) or url not in _PARSERS:
            raise InputError(f"url is {url!r:.60}, expected {' or '.join(_PARSERS)}")
        if not isinstance(body, dict):
            raise InputError(f"body is {body!r:.40}, expected an object: the request")
        # An answer in a file is whole.
        whole = {name: value for name, value in body.items() if (name, value) != ("stream", True)}
        text = json.dumps(whole).encode()
        try:
            self._parsed = _PARSERS[url](text, models, MAX_ANSWERS)
        except ApiError as error:
            raise InputError(str(error)) from error
        self._url, self._tokenizer = url, llm.tokenizer
        self.requests = self._parsed.requests
        self.ignored = [n for n, v in fields.items() if n not in _KNOWN and v is not None]
        self.ignored += ["body.stream"] * (len(whole) < len(body))
        self.ignored += [f"body.{name}" for name in self._parsed.ignored]

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """Return the fields of OpenAI's output, with the whole response that the server gives."""
        if self._url == "/v1/chat/completions":
            choices = ChatChoices(self._parsed, self._tokenizer)
        else:
            prompts = [result.prompt_tokens for result in results]
            choices = CompletionChoices(self._parsed, self._tokenizer, prompts)
        body = whole_body(self._parsed, results, choices)
        return _output(uuid.uuid4().hex, 200, body, None)


def set_seed(fields: dict[str, Any], seed: int) -> None:
    """Give a request a seed, unless it has one."""
    body = fields.get("body")
    if isinstance(body, dict) and body.get("seed") is None:
        body["seed"] = seed


def refusal(error: Exception) -> dict[str, Any]:
    """Return the fields of OpenAI's output for a request that is wrong."""
    cause, request_id = error.__cause__, uuid.uuid4().hex
    refused = to_api_error(cause if isinstance(cause, ApiError) else error)
    details = refused.body(request_id, openai=True)["error"]
    note = {"code": details["code"], "message": details["message"]}
    return _output(request_id, refused.status(openai=True), {"error": details}, note)


def _output(
    request_id: str, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "response": response, "error": error}
