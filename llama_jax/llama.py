"""Llama: load a checkpoint, generate, stream, score. What a notebook imports."""

import collections
import dataclasses
import os
import pathlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from llama_jax import sampling
from llama_jax.checkpoint import Checkpoint, load_checkpoint
from llama_jax.decode import NO_TOKEN, DecodeState
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError
from llama_jax.executor import Executor
from llama_jax.request import GenerationRequest, check_tokens, make_request
from llama_jax.tokenizer import EOS_ID, StreamDecoder, Tokenizer

CHECKPOINT_VARIABLE = "LLAMA_JAX_CHECKPOINT"


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished generation; its fields are those of the command line's JSON."""

    response: str | None
    """The text; None if the checkpoint has no tokenizer."""
    tokens: list[int]
    """Ids generated; the EOS that ended them is left out."""
    prompt_tokens: list[int]
    """Ids the model was fed."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model drew EOS; `length`: max_tokens were drawn."""
    usage: dict[str, int]
    """prompt_tokens, completion_tokens (without EOS) and total_tokens, counted."""
    seed: int
    parameters: dict[str, Any]
    """The effective parameters, defaults and drawn seed included."""
    timings: dict[str, float | None]
    """Seconds: load_s, compile_s, prefill_s (to the first token), decode_s; tokens per second:
    prefill_tokens_per_s, decode_tokens_per_s (None if nothing was decoded)."""


class Stream:
    """Pieces of text as they are drawn; `result` is there once the last has been taken."""

    def __init__(self, pieces: Generator[str, None, Result]):
        self._pieces = pieces
        self._result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as stop:
            self._result = self._result or stop.value
            raise

    @property
    def result(self) -> Result:
        """The whole result, equal to that of `generate`."""
        if self._result is None:
            raise RuntimeError("the stream has not been read to its end yet")
        return self._result


class Llama:
    """A model ready to generate; make one with `load`.

    Generations take turns on one row of the executor. Streams may be read in any interleaving.
    """

    def __init__(self, checkpoint: Checkpoint, *, context: int | None = None, load_s: float = 0.0):
        config = checkpoint.config
        context = config.max_seq_len if context is None else context
        if not 1 <= context <= config.max_seq_len:
            raise InputError(
                f"context is {context}, expected 1 to {config.max_seq_len}, "
                "the positions this model was trained for"
            )
        tokenizer = checkpoint.tokenizer and Tokenizer(checkpoint.tokenizer)
        if tokenizer and tokenizer.vocab_size != config.vocab_size:
            raise InputError(
                f"{checkpoint.tokenizer} has {tokenizer.vocab_size} pieces, the model's "
                f"vocabulary {config.vocab_size}; copy the tokenizer.model of these weights"
            )
        self.config = config
        self.dtype = checkpoint.dtype
        self.tokenizer = tokenizer
        self.load_s = load_s
        self.executor = Executor(config, checkpoint.params, checkpoint.dtype, context=context)
        self._idle: DecodeState | None = None  # one state is kept for the next request

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | None = None,
        *,
        dtype: str | None = None,
        context: int | None = None,
    ) -> "Llama":
        """Restore a checkpoint.

        Args:
            path: what `python -m convert` wrote; None: `default_checkpoint()`.
            dtype: float16, bfloat16 or float32, for weights and cache; None: as stored.
            context: tokens of prompt plus output to hold, at most (and by default) the model's
                max_seq_len. A smaller cache takes less memory.

        Raises:
            InputError: see `load_checkpoint`; context out of range; a tokenizer of another model.
        """
        began = time.perf_counter()
        checkpoint = load_checkpoint(default_checkpoint() if path is None else path, dtype)
        jax.block_until_ready(checkpoint.params)
        return cls(checkpoint, context=context, load_s=time.perf_counter() - began)

    @property
    def context(self) -> int:
        """Tokens of prompt plus output that fit."""
        return self.executor.context

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: all, but one row of the embedding."""
        params = self.executor.params
        total = sum(array.nbytes for array in jax.tree.leaves(params))
        return total if self.config.tie_embeddings else total - params["embed"].nbytes

    def generate(self, **request: Any) -> Result:
        """Generate a whole answer.

        Args:
            **request: prompt, messages or prompt_tokens, and the parameters; see `make_request`.

        Raises:
            InputError: naming what is wrong with the request, or that it does not fit the context.
        """
        stream = self.stream(**request)
        collections.deque(stream, maxlen=0)
        return stream.result

    def stream(self, **request: Any) -> Stream:
        """Generate piece by piece: the same tokens and text as `generate`.

        A piece ends where a character ends. Without a tokenizer a piece is a token id and a comma.
        The request is checked here, before the first piece is asked for.
        """
        return self.start(make_request(**request))

    def start(self, request: GenerationRequest) -> Stream:
        """Generate from a request that is checked already: what `generate` and `stream` run."""
        prompt = request.encode(self.tokenizer, self.config.vocab_size)
        if len(prompt) + request.max_tokens > self.context:
            raise InputError(
                f"prompt has {len(prompt):,} tokens and max_tokens is {request.max_tokens:,}, "
                f"but the context holds {self.context:,}; shorten the prompt or lower max_tokens"
            )
        return Stream(self._pieces(request, prompt))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the float32 logits [T, V] that follow each of T tokens.

        Raises:
            InputError: no ids, ids outside the vocabulary, or more than the context holds.
        """
        check_tokens(token_ids, self.config.vocab_size)
        if len(token_ids) > self.context:
            raise InputError(
                f"got {len(token_ids):,} tokens, but the context holds {self.context:,}; give fewer"
            )
        return self.executor.score(token_ids)

    def _pieces(
        self, request: GenerationRequest, prompt: list[int]
    ) -> Generator[str, None, Result]:
        """Yield the text; return the result. Time spent by the reader is not counted."""
        decoder = StreamDecoder(self.tokenizer) if self.tokenizer else None
        stop_token = NO_TOKEN if request.ignore_eos else EOS_ID
        watch = _Stopwatch(self.executor)
        tokens, pieces, finish_reason = [], [], "length"
        for token in watch.time(self._draw(request, prompt, stop_token)):
            if token == stop_token:
                finish_reason = "stop"
                continue
            tokens.append(token)
            pieces.append(decoder.push(token) if decoder else f"{token},")
            if pieces[-1]:
                yield pieces[-1]
        if decoder and (rest := decoder.finish()):
            pieces.append(rest)
            yield rest
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        return Result(
            response="".join(pieces) if decoder else None,
            tokens=tokens,
            prompt_tokens=prompt,
            finish_reason=finish_reason,
            usage={**usage, "total_tokens": sum(usage.values())},
            seed=request.seed,
            parameters=request.parameters(),
            timings={"load_s": self.load_s, **watch.timings(len(prompt))},
        )

    def _draw(
        self, request: GenerationRequest, prompt: list[int], stop_token: int
    ) -> Iterator[int]:
        """Yield tokens as they are drawn, the stop token included."""
        if request.max_tokens == 0:
            return
        run = self.executor
        state, self._idle = self._idle or run.init_state(), None
        params = sampling.make_params(
            seed=request.seed,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
        )
        state = run.admit(state, 0, params, request.max_tokens, stop_token)
        state, first = run.prefill(state, 0, prompt)
        asked, limit = 1, request.max_tokens
        pending = collections.deque([first])
        # On an accelerator the next chunk runs while the host reads the last one, at the price of
        # a wasted chunk at EOS. On a CPU host and device are the same cores: nothing to hide.
        depth = 1 if jax.default_backend() == "cpu" else 2
        while pending or asked < limit:
            while asked < limit and len(pending) < depth:
                state, tokens = run.decode(state, len(prompt) + asked - 1)
                pending.append(tokens)
                asked += run.decode_steps
            for token in np.asarray(pending.popleft())[:, 0].tolist():
                if token == NO_TOKEN:
                    break
                yield token
                if token == stop_token:
                    pending.clear()
                    limit = 0
                    break
        self._idle = state


class _Stopwatch:
    """Time a generation from inside: without compilation, and without what its reader does."""

    def __init__(self, executor: Executor):
        self._log = executor.compiled
        self._compile_before = executor.compiled.seconds
        self._first_s = self._rest_s = 0.0
        self._count = 0

    def time(self, draws: Iterator[int]) -> Iterator[int]:
        """Pass the tokens on, noting how long each took to come."""
        while True:
            began, compiled = time.perf_counter(), self._log.seconds
            token = next(draws, None)
            spent = time.perf_counter() - began - (self._log.seconds - compiled)
            if self._count == 0:
                self._first_s = spent
            else:
                self._rest_s += spent
            if token is None:
                return
            self._count += 1
            yield token

    def timings(self, prompt_length: int) -> dict[str, float | None]:
        """Return the fields of `Result.timings` but load_s."""
        decoded = self._count - 1
        return {
            "compile_s": self._log.seconds - self._compile_before,
            "prefill_s": self._first_s,
            "decode_s": self._rest_s,
            "prefill_tokens_per_s": prompt_length / self._first_s if self._count else None,
            "decode_tokens_per_s": decoded / self._rest_s if decoded > 0 else None,
        }


def default_checkpoint() -> pathlib.Path:
    """Return $LLAMA_JAX_CHECKPOINT if it is set, else the embedded demo model's folder."""
    return pathlib.Path(os.environ.get(CHECKPOINT_VARIABLE) or DEMO_CHECKPOINT)
