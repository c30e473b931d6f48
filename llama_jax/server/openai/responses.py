"""OpenAI's responses: results and pieces as choices, whole and in chunks.

A whole choice is the chunk of one piece that holds everything. So the chunks of a stream add up to
the whole choice.
"""

import itertools
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llama_jax.engine.result import Piece, Result
from llama_jax.server.openai.logprobs import chat_logprobs, completion_logprobs
from llama_jax.server.openai.requests import ParsedRequest
from llama_jax.server.openai.types import (
    ChatChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
)
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer


class ChatChoices:
    """The choices of a chat completion."""

    whole_object, chunk_object, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, parsed: ParsedRequest, tokenizer: Tokenizer | None):
        self._parsed, self._tokenizer = parsed, tokenizer

    def opening(self, index: int) -> dict[str, Any]:
        """Return the choice in the chunk before the first piece: the role."""
        return _delta(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return the choice in the chunk of a piece; None if it adds nothing."""
        wanted = self._parsed.requests[index].parameters.logprobs is not None
        if not (piece.text or wanted):
            return None
        logprobs = chat_logprobs(piece.logprobs, self._tokenizer) if wanted else None
        return _delta(index, {"content": piece.text}, logprobs)

    def ending(self, index: int, result: Result) -> dict[str, Any]:
        """Return the choice in its last chunk."""
        return _delta(index, {}) | {"finish_reason": result.finish_reason, "seed": result.seed}

    def whole(self, index: int, result: Result) -> ChatChoice:
        """Return a whole choice."""
        wanted = result.logprobs is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": result_text(result), "refusal": None},
            "logprobs": chat_logprobs(result.logprobs or [], self._tokenizer) if wanted else None,
            "finish_reason": result.finish_reason,
            "stop_reason": None,
            "seed": result.seed,
        }


class CompletionChoices:
    """The choices of a completion.

    Args:
        parsed: the request.
        tokenizer: None: the model has none.
        prompts: the token ids of each request's prompt.
    """

    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self, parsed: ParsedRequest, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]]
    ):
        self._parsed, self._tokenizer = parsed, tokenizer
        # The BOS that the server has put before a prompt is not the client's to see.
        self._added = [int(request.adds_bos) for request in parsed.requests]
        self._texts = [
            _CompletionText(prompt[added:], tokenizer, parsed.echo)
            for prompt, added in zip(prompts, self._added, strict=True)
        ]

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice in a chunk with the prompt, if it is echoed."""
        return self._choice(index, self._prompt(index)) if self._parsed.echo else None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return the choice in the chunk of a piece; None if it adds nothing."""
        texts = self._texts[index]
        text = texts.leading_separator(piece.tokens) + piece.text
        if self._parsed.requests[index].parameters.logprobs is None:
            return self._choice(index, text) if text else None
        offsets = texts.offsets(piece.tokens)
        logprobs = completion_logprobs(piece.tokens, piece.logprobs, offsets, self._tokenizer)
        return self._choice(index, text, logprobs)

    def ending(self, index: int, result: Result) -> dict[str, Any]:
        """Return the choice in its last chunk."""
        last = self._choice(index, "")
        return last | {"finish_reason": result.finish_reason, "seed": result.seed}

    def whole(self, index: int, result: Result) -> CompletionChoice:
        """Return a whole choice."""
        choice = self.chunk(index, _all(result)) or self._choice(index, "")
        text, logprobs = choice["text"], choice["logprobs"]
        if self._parsed.echo:
            text = self._prompt(index) + text
        if self._parsed.echo and logprobs:
            assert result.prompt_logprobs is not None
            offsets = self._texts[index].prompt_offsets() + logprobs["text_offset"]
            added = self._added[index]
            tokens = result.prompt_tokens[added:] + result.tokens
            entries = result.prompt_logprobs[added:] + (result.logprobs or [])
            logprobs = completion_logprobs(tokens, entries, offsets, self._tokenizer)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
        }

    def _prompt(self, index: int) -> str:
        request = self._parsed.requests[index]
        raw = None if request.parse_control else request.raw_prompt
        return self._texts[index].prompt if raw is None else raw

    def _choice(
        self, index: int, text: str, logprobs: CompletionLogprobs | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


class _CompletionText:
    """The text of one completion, which continues its prompt.

    Args:
        prompt: token ids.
        tokenizer: None: the text is the ids, separated by commas.
        echo: whether the text begins with the prompt, so that offsets count it.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer | None, echo: bool):
        self._tokens, self._tokenizer = prompt, tokenizer
        self._decoder: StreamDecoder | None = None
        self.prompt = ",".join(map(str, prompt))
        if tokenizer:
            self.prompt = tokenizer.decode(list(prompt))
            shown = any(not tokenizer.is_control(token) for token in prompt)
            self._decoder = StreamDecoder(tokenizer, continues=shown)
        self._position = len(self.prompt) if echo else 0
        self._separator = "," if echo and not tokenizer else ""

    def prompt_offsets(self) -> list[int]:
        """Return the position in the prompt's text where each of its tokens begins."""
        decoder = StreamDecoder(self._tokenizer) if self._tokenizer else None
        lengths = [len(decoder.push(token) if decoder else f"{token},") for token in self._tokens]
        return list(itertools.accumulate(lengths[:-1], initial=0))

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Return the position in the whole text where each of the next tokens begins."""
        offsets = []
        for token in tokens:
            offsets.append(self._position)
            self._position += len(self._decoder.push(token) if self._decoder else f"{token},")
        return offsets

    def leading_separator(self, tokens: Sequence[int]) -> str:
        """Return, once, what separates the prompt's ids from the next ones."""
        separator = self._separator if tokens else ""
        self._separator = self._separator[len(separator) :]
        return separator


def usage(parsed: ParsedRequest, results: Sequence[Result]) -> CompletionUsage:
    """Count tokens: each prompt's once, each choice's."""
    first = results[:: parsed.n]
    prompt = sum(len(result.prompt_tokens) for result in first)
    completion = sum(len(result.tokens) for result in results)
    cached = sum(result.usage.cached_tokens for result in first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def whole_body(
    parsed: ParsedRequest,
    results: Sequence[Result],
    choices: ChatChoices | CompletionChoices,
) -> dict[str, Any]:
    """Return a whole response."""
    first = head(choices.whole_object, choices.id_prefix, parsed.model, results[0].fingerprint)
    whole = [choices.whole(i, result) for i, result in enumerate(results)]
    return first | {"choices": whole, "usage": usage(parsed, results)} | warnings(parsed, results)


def warnings(parsed: ParsedRequest, results: Iterable[Result]) -> dict[str, Any]:
    """Return the field of the request's and the results' warnings, if there are any."""
    found = dict.fromkeys([*parsed.warnings, *(w for result in results for w in result.warnings)])
    return {"warnings": [*found]} if found else {}


def head(kind: str, id_prefix: str, model: str, fingerprint: str) -> dict[str, Any]:
    """Return the first fields of a response or chunk."""
    return {
        "id": f"{id_prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def _delta(
    index: int, delta: dict[str, str], logprobs: ChatLogprobs | None = None
) -> dict[str, Any]:
    """Return the choice in a chunk of a chat completion."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def result_text(result: Result) -> str:
    """Return a result's text; without a tokenizer, its token ids."""
    return ",".join(map(str, result.tokens)) if result.response is None else result.response


def _all(result: Result) -> Piece:
    return Piece(result_text(result), result.tokens, result.logprobs or [])
