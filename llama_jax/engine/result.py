"""What a generation gives: pieces of text as they come, then a Result."""

import dataclasses
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself found a token: natural logarithms, before penalties and filters.

    So temperature, top-k and top-p do not enter; a token that those made certain can be unlikely.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens with theirs, falling; as many as were asked for."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text, ending where a character ends, and the tokens that it took."""

    text: str
    """May be empty: of tokens held back, or with no tokenizer."""
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One for each of `tokens` if the request asks for them, else none."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished generation; its fields are those of the command line's JSON."""

    response: str | None
    """The text; None if the checkpoint has no tokenizer."""
    tokens: list[int]
    """Ids generated; the EOS that ended them is left out."""
    prompt_tokens: list[int]
    """Ids the model was fed."""
    finish_reason: FinishReason
    """`stop`: the model drew EOS or spelt a stop string; `length`: max_tokens were drawn;
    `cancelled`: its reader gave it up."""
    usage: dict[str, int]
    """prompt_tokens, completion_tokens (without EOS) and total_tokens, counted."""
    seed: int
    fingerprint: str
    """Of weights and configuration: where it and the request are equal, so are the tokens (on a GPU
    or TPU as far as docs/design.md says, Exactness)."""
    parameters: dict[str, Any]
    """The effective parameters, defaults and drawn seed included."""
    timings: dict[str, float | None]
    """Seconds: load_s, compile_s, queue_s, prefill_s (to the first token), decode_s; tokens per
    second: prefill_tokens_per_s, decode_tokens_per_s (None if nothing was decoded); and
    reused_tokens: of the prompt, how many were in the cache already."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `tokens`, if asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each of `prompt_tokens` but the first, if asked for."""
