"""Llama: load a checkpoint, generate, stream, score. What a notebook imports."""

import collections
import os
import pathlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax import sampling
from llama_jax.checkpoint import Checkpoint, load_checkpoint
from llama_jax.compile_cache import use_compile_cache
from llama_jax.decode import NO_TOKEN, DecodeState
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError
from llama_jax.executor import Executor
from llama_jax.request import GenerationRequest, check_tokens, make_request
from llama_jax.result import Result, Stopwatch, Stream
from llama_jax.tokenizer import EOS_ID, StreamDecoder, Tokenizer

CHECKPOINT_VARIABLE = "LLAMA_JAX_CHECKPOINT"


class Llama:
    """A model ready to generate; make one with `load`.

    Generations take turns on one row of the executor. Streams may be read in any interleaving.
    """

    def __init__(self, checkpoint: Checkpoint, *, context: int | None = None, load_s: float = 0.0):
        config = checkpoint.config
        context = config.max_seq_len if context is None else context
        if type(context) is not int or not 1 <= context <= config.max_seq_len:
            raise InputError(
                f"context is {context!r}, expected 1 to {config.max_seq_len}, "
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
        verify: bool = False,
        progress: bool = False,
    ) -> "Llama":
        """Restore a checkpoint; from then on, programs compiled are kept (`use_compile_cache`).

        Args:
            path: what `python -m convert` wrote; None: `default_checkpoint()`.
            dtype: float16, bfloat16 or float32, for weights and cache; None: as stored.
            context: tokens of prompt plus output to hold, at most (and by default) the model's
                max_seq_len. A smaller cache takes less memory.
            verify: first compare all weights with the checkpoint's digests.
            progress: show bars on stderr if it takes over a second.

        Raises:
            InputError: see `load_checkpoint`; context out of range; a tokenizer of another model.
        """
        use_compile_cache()
        began = time.perf_counter()
        path = default_checkpoint() if path is None else path
        checkpoint = load_checkpoint(path, dtype, verify=verify, progress=progress)
        jax.block_until_ready(checkpoint.params)
        return cls(checkpoint, context=context, load_s=time.perf_counter() - began)

    @property
    def context(self) -> int:
        """Tokens of prompt plus output that fit."""
        return self.executor.context

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads; of the embedding table, next to none."""
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

        A piece ends where a character ends. Without a tokenizer the text is the ids, with commas.
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
        token_ids = check_tokens(token_ids, self.config.vocab_size, "token_ids")
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
        watch = Stopwatch(self.executor)
        tokens, pieces, finish_reason = [], [], "length"
        for token in watch.time(self._draw(request, prompt, stop_token)):
            if token == stop_token:
                finish_reason = "stop"
                continue
            tokens.append(token)
            id_text = f",{token}" if pieces else str(token)
            pieces.append(decoder.push(token) if decoder else id_text)
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
        while pending or asked < limit:
            while asked < limit and len(pending) < run.plan.dispatches:
                state, tokens = run.decode(state, len(prompt) + asked - 1)
                pending.append(tokens)
                asked += run.plan.decode_steps
            for token in np.asarray(pending.popleft())[:, 0].tolist():
                if token == NO_TOKEN:
                    break
                yield token
                if token == stop_token:
                    pending.clear()
                    limit = 0
                    break
        self._idle = state


def default_checkpoint() -> pathlib.Path:
    """Return $LLAMA_JAX_CHECKPOINT if it is set, else the embedded demo model's folder."""
    return pathlib.Path(os.environ.get(CHECKPOINT_VARIABLE) or DEMO_CHECKPOINT)
