"""Score: the log-likelihood of a text under the model, read in windows."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llama_jax.engine.request import GenerationRequest, check_tokens, make_request
from llama_jax.engine.result import Result, TokenLogprob
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer

Text = str | Sequence[int]
"""Text, or token ids."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The likelihood of text under the model alone."""

    logprob: float
    """The log-likelihood in nats: the sum of the tokens' log-probabilities."""
    num_tokens: int
    """Tokens scored."""
    num_bytes: int | None
    """Bytes of UTF-8 that they stand for; None: there is no tokenizer."""

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-likelihood: the loss in training."""
        return -self.logprob / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The exponential of `nats_per_token`; infinite where a float does not hold it."""
        with contextlib.suppress(OverflowError):
            return math.exp(self.nats_per_token)
        return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-likelihood in bits for each byte of text, comparable over tokenizers."""
        return -self.logprob / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclasses.dataclass(frozen=True)
class Score(Likelihood):
    """The likelihood of one text."""

    tokens: list[int]
    """Ids of the tokens scored: not BOS, and not those of the context."""
    token_logprobs: list[float]
    """One for each of `tokens`."""
    is_greedy: bool
    """Whether each of `tokens` is the most likely one at its place."""
    fingerprint: str
    """See `Result`."""
    warnings: list[str]
    """See `Result`."""
    quantization: str | None = None
    """See `Result`."""


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A text to score, cut into windows; see `make_score_request`."""

    tokens: list[int]
    """All ids to read, BOS and context included."""
    windows: list[tuple[int, int, int]]
    """(begin, end, target): tokens[begin:end] are read to score tokens[target:end]."""
    tokenizer: Tokenizer | None
    warnings: list[str]

    @property
    def requests(self) -> list[GenerationRequest]:
        """One for each window. They generate nothing."""
        fields = {"max_tokens": 0, "seed": 0, "logprobs": 1, "prompt_logprobs": True}
        return [
            make_request(prompt_tokens=self.tokens[begin:end], **fields)
            for begin, end, _ in self.windows
        ]

    def score(self, results: Iterable[Result]) -> Score:
        """Return the score, from the result of each of `requests`, in order."""
        entries: list[TokenLogprob] = []
        fingerprint, quantization = "", None
        for (begin, _, target), result in zip(self.windows, results, strict=True):
            assert result.prompt_logprobs is not None
            entries += [entry for entry in result.prompt_logprobs[target - begin :] if entry]
            fingerprint, quantization = result.fingerprint, result.quantization
        return Score(
            logprob=math.fsum(entry.logprob for entry in entries),
            num_tokens=len(entries),
            num_bytes=self.tokenizer and self._num_bytes(self.tokenizer),
            tokens=[entry.token for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            is_greedy=all(entry.logprob >= entry.top[0][1] for entry in entries),
            fingerprint=fingerprint,
            warnings=self.warnings,
            quantization=quantization,
        )

    def _num_bytes(self, tokenizer: Tokenizer) -> int:
        """Return the bytes of the tokens scored."""
        visible = (i for i, token in enumerate(self.tokens) if not tokenizer.is_control(token))
        first = next(visible, None)
        total = 0
        for i in itertools.chain.from_iterable(range(t, end) for _, end, t in self.windows):
            token = self.tokens[i]
            # SentencePiece puts a space before a text, which is no part of it.
            added = i == first and tokenizer.piece(token).startswith("▁")
            total += tokenizer.num_bytes(token) - added
        return total


def make_score_request(
    text: Text,
    continuation: Text | None,
    *,
    stride: int | None,
    parse_control: bool,
    context: int,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> ScoreRequest:
    """Check what is to be scored, encode it and cut it into windows.

    Args:
        text, continuation, stride, parse_control: see `Llama.score`.
        context: tokens that a window holds.
        tokenizer: the model's.
        vocab_size: the model's.

    Raises:
        InputError: see `Llama.score`.
    """
    stride = max(1, context // 2) if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= context:
        raise InputError(f"stride is {stride!r:.40}, expected an integer from 1 to {context:,}")
    given = [text] if continuation is None else [text, continuation]
    _check_parts(given)
    warnings: list[str] = []
    before = [] if continuation is None else text
    if isinstance(text, str):
        request = make_request(
            prompt="".join(map(str, given)), raw=True, parse_control=parse_control
        )
        warnings = request.warnings(tokenizer)
        tokens, first = request.encode(tokenizer, vocab_size), 1
        if before and (before := text.rstrip()):
            request = dataclasses.replace(request, raw_prompt=before)
            first = len(request.encode(tokenizer, vocab_size))
    else:
        tokens = check_tokens(before, vocab_size, "text") if len(before) else []
        first = len(tokens)
        tokens += check_tokens(given[-1], vocab_size, "the ids to score")
    windows = list(cut_windows(len(tokens), first, context, stride))
    if not windows:
        raise InputError(
            f"there is nothing to score: {len(tokens):,} tokens in a context of {context:,}, and "
            "the first has none before it; give more text, or a larger context"
        )
    return ScoreRequest(tokens, windows, tokenizer, warnings)


def _check_parts(given: Sequence[Text]) -> None:
    """Refuse what is neither text nor ids, two kinds together, and nothing to score."""
    for part in given:
        if not hasattr(part, "__len__") or isinstance(part, bytes | Mapping):
            raise InputError(f"the text is {part!r:.40}, expected a string or a list of token ids")
    if len({isinstance(part, str) for part in given}) > 1:
        raise InputError("text and continuation are of two kinds, expected two texts or two lists")
    if not len(given[-1]):
        name = "continuation" if len(given) > 1 else "the text"
        raise InputError(f"{name} is empty, expected at least 1 character or token id")


def cut_windows(
    length: int, first: int, context: int, stride: int
) -> Iterator[tuple[int, int, int]]:
    """Cut a text into windows, so that each of its tokens from `first` on is scored once.

    They are those of Hugging Face's guide to the perplexity of fixed-length models: each has
    `context` tokens and begins `stride` after the one before. The first token of a window cannot be
    scored, as nothing is before it; only with a stride of `context` is it not in an earlier window.

    Yields:
        (begin, end, target): tokens[begin:end] are read to score tokens[target:end].
    """
    target = first
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        target = max(target, begin + 1)
        if target < end:
            yield begin, end, target
        if end == length:
            return
        target = max(target, end)
