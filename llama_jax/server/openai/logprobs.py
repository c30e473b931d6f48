"""Logprobs: tokens and their log-probabilities in OpenAI's two formats."""

from collections.abc import Iterable, Sequence

from llama_jax.engine.result import TokenLogprob
from llama_jax.server.openai.types import ChatLogprobs, CompletionLogprobs, TopLogprob
from llama_jax.text.tokenizer import Tokenizer


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    r"""Return a token's own text, its leading space included; of a byte, `bytes:\xNN`."""
    if tokenizer is None:
        return f"token_id:{token}"
    byte = tokenizer.byte(token)
    if byte is not None:
        return f"bytes:\\x{byte:02x}"
    return tokenizer.piece(token).replace("▁", " ")


def chat_logprobs(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer | None) -> ChatLogprobs:
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
) -> CompletionLogprobs:
    """Return `choices[].logprobs` of a completion.

    Args:
        tokens: ids.
        logprobs: one for each token; None for the first of a text.
        offsets: the position in the choice's text where each token begins, in characters.
        tokenizer: None: the model has none.
    """
    return {
        "tokens": [token_text(token, tokenizer) for token in tokens],
        "token_logprobs": [entry and entry.logprob for entry in logprobs],
        "top_logprobs": [entry and _most_likely(entry, tokenizer) for entry in logprobs],
        "text_offset": list(offsets),
    }


def _most_likely(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Return the most likely tokens, and always the token itself."""
    return {
        token_text(token, tokenizer): value
        for token, value in [*entry.top, (entry.token, entry.logprob)]
    }


def _token(token: int, logprob: float, tokenizer: Tokenizer | None) -> TopLogprob:
    text = token_text(token, tokenizer)
    encoded: list[int] | None = list(text.encode())
    if tokenizer is None or tokenizer.is_control(token):
        encoded = None
    elif (byte := tokenizer.byte(token)) is not None:
        encoded = [byte]
    return {"token": text, "logprob": logprob, "bytes": encoded}
