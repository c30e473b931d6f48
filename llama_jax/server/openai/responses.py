"""OpenAI's responses: results and pieces to choices, whole and in chunks.

A whole choice is made of one piece that holds everything, by the code that makes a stream's: so
the chunks of a stream add up to it.
"""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from llama_jax.engine.result import Piece, Result
from llama_jax.server.openai.logprobs import chat_logprobs, completion_logprobs
from llama_jax.server.openai.requests import ParsedRequest
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer


class ChatChoices:
    """The choices of a chat completion."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: ParsedRequest, tokenizer: Tokenizer | None):
        self._asked, self._tokenizer = asked, tokenizer

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what comes before the first piece: nothing."""
        return None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return what a piece adds, if it adds anything."""
        wanted = self._asked.requests[index].parameters.logprobs is not None
        if not (piece.text or wanted):
            return None
        choice: dict[str, Any] = {"index": index, "delta": {"content": piece.text}}
        if wanted:
            choice["logprobs"] = chat_logprobs(piece.logprobs, self._tokenizer)
        return choice

    def ending(self, index: int, result: Result) -> dict[str, Any]:
        """Return a stream's last word of a choice."""
        return {
            "index": index,
            "delta": {},
            "finish_reason": result.finish_reason,
            "seed": result.seed,
        }

    def whole(self, index: int, result: Result) -> dict[str, Any]:
        """Return a whole choice."""
        choice = self.chunk(index, _all(result)) or {}
        message = {"role": "assistant", "content": result_text(result), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": choice.get("logprobs"),
            "finish_reason": result.finish_reason,
            "stop_reason": None,
            "seed": result.seed,
        }


class CompletionChoices:
    """The choices of a completion.

    Args:
        asked: what is asked for.
        tokenizer: None: there is none.
        prompts: the ids of each request's prompt.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self, asked: ParsedRequest, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]]
    ):
        self._asked, self._tokenizer = asked, tokenizer
        self._texts = [_CompletionText(prompt, tokenizer, asked.echo) for prompt in prompts]

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the prompt, if it is to be echoed."""
        return self._choice(index, self._prompt(index)) if self._asked.echo else None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return what a piece adds, if it adds anything."""
        texts = self._texts[index]
        text = texts.leading_separator(piece.tokens) + piece.text
        if self._asked.requests[index].parameters.logprobs is None:
            return self._choice(index, text) if text else None
        offsets = texts.offsets(piece.tokens)
        logprobs = completion_logprobs(piece.tokens, piece.logprobs, offsets, self._tokenizer)
        return self._choice(index, text, logprobs)

    def ending(self, index: int, result: Result) -> dict[str, Any]:
        """Return a stream's last word of a choice."""
        return self._choice(index, "") | _reason(result)

    def whole(self, index: int, result: Result) -> dict[str, Any]:
        """Return a whole choice."""
        choice = self.chunk(index, _all(result)) or self._choice(index, "")
        if self._asked.echo:
            choice["text"] = self._prompt(index) + choice["text"]
        if self._asked.echo and choice["logprobs"]:
            assert result.prompt_logprobs is not None
            before = completion_logprobs(
                result.prompt_tokens,
                result.prompt_logprobs,
                self._texts[index].prompt_offsets(),
                self._tokenizer,
            )
            after = choice["logprobs"]
            choice["logprobs"] = {name: before[name] + after[name] for name in before}
        return choice | _reason(result)

    def _prompt(self, index: int) -> str:
        raw = self._asked.requests[index].raw_prompt
        return self._texts[index].prompt if raw is None else raw

    def _choice(self, index: int, text: str, logprobs: dict | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


class _CompletionText:
    """The text of one completion, which goes on where its prompt ends.

    A generation's own text begins without the space that its first word's token may have, as Meta's
    and every answer in a dialog does. After a prompt that would glue two words together.

    Args:
        prompt: its ids.
        tokenizer: None: ids are the text, with commas.
        echo: whether the prompt is part of the text, so that offsets count it.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer | None, echo: bool):
        self._tokens, self._tokenizer = prompt, tokenizer
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self.prompt = ",".join(map(str, prompt))
        if tokenizer and self._decoder:
            self.prompt = tokenizer.decode(list(prompt))
            shown = [token for token in prompt if not tokenizer.is_control(token)]
            for token in shown[-1:]:  # behind it, a word's own space is kept
                self._decoder.push(token)
                self._decoder.finish()
        self._position = len(self.prompt) if echo else 0
        self._separator_is_due = bool(self.prompt) if tokenizer else echo

    def prompt_offsets(self) -> list[int]:
        """Return where in the prompt's text its tokens begin."""
        decoder = StreamDecoder(self._tokenizer) if self._tokenizer else None
        lengths = [len(decoder.push(token) if decoder else f"{token},") for token in self._tokens]
        return list(itertools.accumulate(lengths[:-1], initial=0))

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Return where in the whole text the next tokens begin."""
        offsets = []
        for token in tokens:
            offsets.append(self._position)
            self._position += len(self._decoder.push(token) if self._decoder else f"{token},")
        return offsets

    def leading_separator(self, tokens: Sequence[int]) -> str:
        """Return, once, what stands between the prompt and the first token that shows."""
        tokenizer = self._tokenizer
        shown = [token for token in tokens if not (tokenizer and tokenizer.is_control(token))]
        if not self._separator_is_due or not shown:
            return ""
        self._separator_is_due = False
        if tokenizer is None:
            return ","
        return " " if tokenizer.piece(shown[0]).startswith("▁") else ""


def usage(asked: ParsedRequest, results: Sequence[Result]) -> dict[str, Any]:
    """Count tokens: each prompt's once, each choice's."""
    first = results[:: asked.n]
    prompt = sum(len(result.prompt_tokens) for result in first)
    completion = sum(len(result.tokens) for result in results)
    cached = sum(result.usage.cached_tokens for result in first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def head(kind: str, model: str) -> dict[str, Any]:
    """Return what every response and chunk begins with."""
    now = time.time()
    return {"id": f"id-{int(now * 1000)}", "object": kind, "created": int(now), "model": model}


def result_text(result: Result) -> str:
    """Return a result's text; without a tokenizer, its ids."""
    return ",".join(map(str, result.tokens)) if result.response is None else result.response


def _all(result: Result) -> Piece:
    return Piece(result_text(result), result.tokens, result.logprobs or [])


def _reason(result: Result) -> dict[str, Any]:
    return {"finish_reason": result.finish_reason, "seed": result.seed}
