"""Generation: one request on its way through the engine, from token ids to text."""

import collections
import contextlib
import copy
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import NoReturn

from llama_jax.decode.sampling import NO_TOKEN
from llama_jax.decode.steps import Logprobs
from llama_jax.engine.clock import Clock
from llama_jax.engine.counts import Counts
from llama_jax.engine.draw import Draw
from llama_jax.engine.environment import UNKNOWN, Environment
from llama_jax.engine.record import Record
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import (
    FinishReason,
    Piece,
    Result,
    Speculated,
    TokenLogprob,
    Usage,
)
from llama_jax.engine.times import Times
from llama_jax.jax_settings import to_host
from llama_jax.text.stop import StopCutter
from llama_jax.text.tokenizer import EOS_ID, StreamDecoder, Tokenizer


class Generation:
    """A request that was submitted: its pieces, then its result or the error that ended it.

    The engine fills it, in whatever thread drives the engine; another may read and cancel it.

    Args:
        request: what to generate.
        prompt: its token ids.
        tokenizer: None: the text is the ids, with commas.
        eos_tokens: the ids that end it, unless the request ignores them.
        clock: the engine's.
        environment: the engine's.
        on_change: called, in the engine's thread, when there is something new.
        client: whose it is.
        max_slots: slots that the client may have while others are active; None: see `Queue.next`.
        invocation: its name in its record; "": one is made up.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        tokenizer: Tokenizer | None,
        *,
        eos_tokens: Sequence[int] = (EOS_ID,),
        clock: Clock,
        environment: Environment = UNKNOWN,
        on_change: Callable[[], None] | None = None,
        client: str = "",
        max_slots: int | None = None,
        invocation: str = "",
    ):
        self.request, self.prompt, self.client = request, prompt, client
        self.prefix = [*prompt, *(draw.token for draw in request.resumed)]
        """Ids to read before the first draw: the prompt, and what it continues."""
        self.max_slots = max_slots
        ignored = request.parameters.ignore_eos
        self.stop_tokens = tuple(NO_TOKEN if ignored else token for token in eos_tokens)
        """The ids that end it; NO_TOKEN in place of each that does not."""
        self.tokens: list[int] = []
        self.draws: list[Draw] = []
        """Of `tokens`, and of the stop token that ended it."""
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.cancelled = self.background = self.streamed = False
        self.preemptions = 0
        """Slots in a row that it gave up, as background work, before it drew a token; `Waiting`."""
        self.reused = 0
        """Tokens of the prompt served from the prefix cache."""
        self._passes: Counts = Counts()
        self._pieces: collections.deque[Piece] = collections.deque()
        self._tokenizer = tokenizer
        self._decoder = _decoder(request, prompt, tokenizer)
        self._cutter = StopCutter(request.parameters.stop)
        self._texts: list[str] = []
        self._waiting = Piece("", [], [])  # tokens whose text has not come yet
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._environment, self._on_change = environment, on_change
        self._invocation, self._started = invocation or str(uuid.uuid4()), time.time()
        self._times = Times(clock)
        self._ended = threading.Event()
        is_scored = request.parameters.logprobs is not None
        for draw in request.resumed:
            self._take(draw, TokenLogprob(draw.token, draw.logprob, []) if is_scored else None)

    @property
    def done(self) -> bool:
        """Whether its result or its error is there; pieces may still be waiting to be taken."""
        return self._ended.is_set()

    @property
    def submitted(self) -> float:
        """When it was submitted, on the clock of `time.perf_counter`."""
        return self._times.submitted

    @property
    def max_tokens(self) -> int:
        """Tokens to generate at most; the engine has set it."""
        limit = self.request.parameters.max_tokens
        assert limit is not None
        return limit

    @property
    def is_empty(self) -> bool:
        """Whether it requests no tokens and no log-probabilities of its prompt."""
        return self.max_tokens == 0 and not self.request.parameters.prompt_logprobs

    @property
    def unread(self) -> bool:
        """Whether there are pieces to take."""
        return bool(self._pieces)

    def take(self) -> Piece | None:
        """Return the next piece, or None if there is none yet."""
        return self._pieces.popleft() if self._pieces else None

    def cancel(self) -> None:
        """End it at the engine's next turn; its slot is then free."""
        self.cancelled = True

    def raise_error(self) -> NoReturn:
        """Raise a copy of the error that ended it: each reader adds frames of its own."""
        assert self.error is not None
        error = self.error
        with contextlib.suppress(Exception):  # a type that cannot be copied
            error = copy.copy(self.error).with_traceback(self.error.__traceback__)
            error.__cause__ = self.error.__cause__
        raise error

    # Called by the engine.

    def begin(self, reused: int) -> None:
        """Record that it has a slot, whose cache holds `reused` tokens of its prompt."""
        self.reused = reused
        self._times.begin()

    def count_passes(self, drafted: int, accepted: int, passes: int, tokens: int) -> None:
        """Count what speculation did for it in a turn."""
        self._passes.count_passes(drafted, accepted, passes, tokens)

    def push(self, draw: Draw, logprob: TokenLogprob | None = None) -> None:
        """Add the next draw, up to the one that ends it; turn it into text."""
        self._times.token()
        self._take(draw, logprob)

    def _take(self, draw: Draw, logprob: TokenLogprob | None) -> None:
        token = draw.token
        self.draws.append(draw)
        if token in self.stop_tokens:
            return self.finish("stop")
        self.tokens.append(token)
        text = self._cutter.push(self._text(token))
        self._waiting.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
            self._waiting.logprobs.append(logprob)
        if text:
            self._emit(text)
        if self._cutter.stopped:
            return self.finish("stop")
        if len(self.tokens) == self.max_tokens:
            return self.finish("length")
        return None

    def push_prompt_logprobs(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Add the log-probabilities of the prompt's next tokens."""
        self._prompt_logprobs += logprobs

    def finish(self, reason: FinishReason) -> None:
        """Emit what was held back, and make the result."""
        if self._decoder:
            rest = self._cutter.push(self._decoder.finish()) + self._cutter.finish()
        else:
            rest = self._cutter.finish()
        if rest or self._waiting.tokens:
            self._emit(rest)
        if self._cutter.stopped:
            reason = "stop"
        parameters = self.request.parameters
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            total_tokens=len(self.prompt) + len(self.tokens),
            cached_tokens=self.reused,
        )
        self.result = Result(
            response="".join(self._texts) if self._decoder else None,
            tokens=self.tokens,
            prompt_tokens=self.prompt,
            finish_reason=reason,
            usage=usage,
            seed=parameters.seed,
            fingerprint=self._environment.fingerprint,
            parameters=parameters,
            timings=self._times.summary(len(self.prefix), self.reused),
            warnings=self.request.warnings(self._tokenizer),
            logprobs=None if parameters.logprobs is None else self._logprobs,
            prompt_logprobs=self._prompt_logprobs if parameters.prompt_logprobs else None,
            speculation=self._speculated(),
            quantization=self._environment.label,
            record=self._record(),
        )
        self._end()

    def _speculated(self) -> Speculated | None:
        done = self._passes
        if not done.passes:
            return None
        rate = round(done.pass_tokens / done.passes, 6)
        return Speculated(done.drafted, done.accepted, done.passes, rate)

    def _record(self) -> Record:
        return Record(
            request=self.request,
            environment=self._environment,
            draws=self.draws,
            invocation=self._invocation,
            started=self._started,
            finished=time.time(),
        )

    def fail(self, error: BaseException) -> None:
        """End it by an error, which its readers raise."""
        self.error = error
        with contextlib.suppress(Exception):
            self._end()

    def changed(self) -> None:
        """Notify the reader that there is something new."""
        if self._on_change:
            self._on_change()

    def _end(self) -> None:
        self._ended.set()
        self.changed()

    def _emit(self, text: str) -> None:
        self._texts.append(text)
        self._pieces.append(Piece(text, self._waiting.tokens, self._waiting.logprobs))
        self._waiting = Piece("", [], [])

    def _text(self, token: int) -> str:
        if self._decoder:
            return self._decoder.push(token)
        return f",{token}" if len(self.tokens) > 1 else str(token)


def _decoder(
    request: GenerationRequest, prompt: Sequence[int], tokenizer: Tokenizer | None
) -> StreamDecoder | None:
    """Return the decoder of a generation's tokens; None: there is no tokenizer."""
    if tokenizer is None:
        return None
    shown = any(not tokenizer.is_control(token) for token in prompt)
    return StreamDecoder(tokenizer, continues=request.continues_prompt and shown)


def token_logprobs(
    logprobs: Logprobs, column: int, tokens: Sequence[int], count: int
) -> list[TokenLogprob]:
    """Turn one column of arrays into a TokenLogprob for each token, with `count` alternatives."""
    chosen, top, ids = (a[:, column].tolist() for a in to_host(logprobs))
    return [
        TokenLogprob(token, chosen[t], list(zip(ids[t][:count], top[t][:count], strict=True)))
        for t, token in enumerate(tokens)
    ]
