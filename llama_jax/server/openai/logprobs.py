"""Logprobs: how OpenAI's two formats spell tokens and their probabilities."""

from collections.abc import Iterable, Sequence
from typing import Any

from llama_jax.engine.result import TokenLogprob
from llama_jax.text.tokenizer import Tokenizer


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    r"""Return a token's own text, its leading space included; of a byte, `bytes:\xNN`."""
    if tokenizer is None:
        return f"token_id:{token}"
    byte = tokenizer.byte(token)
    if byte is not None:
        return f"bytes:\\x{byte:02x}"
    return tokenizer.piece(token).replace("▁", " ")


def chat_logprobs(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat completion."""
    return {
        "content": [
            {
                **_token(entry.token, entry.logprob, tokenizer),
                "top_logprobs": [_token(token, value, tokenizer) for token, value in entry.top],
            }
            for entry in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return `choices[].logprobs` of a completion.

    Args:
        tokens: ids.
        logprobs: theirs; None for a text's first.
        offsets: where in the choice's text each begins, in characters.
        tokenizer: None: there is none.
    """
    return {
        "tokens": [token_text(token, tokenizer) for token in tokens],
        "token_logprobs": [entry and entry.logprob for entry in logprobs],
        "top_logprobs": [entry and _likeliest(entry, tokenizer) for entry in logprobs],
        "text_offset": list(offsets),
    }


def _likeliest(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Return the likeliest tokens, and the token itself be it one of them or not."""
    return {
        token_text(token, tokenizer): value
        for token, value in [*entry.top, (entry.token, entry.logprob)]
    }


def _token(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = token_text(token, tokenizer)
    spelt: list[int] | None = list(text.encode())
    if tokenizer is None or tokenizer.is_control(token):
        spelt = None
    elif (byte := tokenizer.byte(token)) is not None:
        spelt = [byte]
    return {"token": text, "logprob": logprob, "bytes": spelt}
