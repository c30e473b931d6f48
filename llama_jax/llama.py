"""Llama: load a checkpoint, generate, stream, score. What a notebook imports."""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from llama_jax.config import check_sizes
from llama_jax.decode.executor import Executor
from llama_jax.decode.lockstep import Lockstep
from llama_jax.decode.memory import check_fits
from llama_jax.decode.plan import choose_plan
from llama_jax.drafters import DEFAULT_TOKENS, OFF, check_speculation, open_drafter
from llama_jax.engine.engine import Engine
from llama_jax.engine.environment import describe
from llama_jax.engine.queue import check_max_queue
from llama_jax.engine.request import GenerationRequest, Request, check_tokens, make_request
from llama_jax.engine.result import Result
from llama_jax.engine.score import Score, ScoreRequest, Text, make_score_request
from llama_jax.engine.stream import Stream, finish_in_order, read_all
from llama_jax.errors import InputError
from llama_jax.nn.sharding import check_replicas, find_mesh, replicas_of
from llama_jax.progress import progress_bar, say
from llama_jax.source import find_checkpoint
from llama_jax.text.tokenizer import Tokenizer, check_vocabulary
from llama_jax.weights.checkpoint import Checkpoint, load_checkpoint, open_checkpoint
from llama_jax.weights.dtypes import choose_dtype


class Llama:
    """A model ready to generate; make one with `load`.

    It generates as many answers at once as it has slots; more wait their turn. Streams may be read
    in any interleaving. Methods may be called from several threads.

    Args:
        checkpoint: as from `load_checkpoint`.
        context, slots, max_queue: see `load`.
        reuse: see `Engine`.
        load_s: seconds that loading took, for the results' timings.
        speculate, speculate_tokens, lockstep: see `load`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        context: int | None = None,
        slots: int = 1,
        reuse: bool = True,
        max_queue: int | None = None,
        determinism: str = "strict",
        speculate: str | os.PathLike[str] | None = OFF,
        speculate_tokens: int = DEFAULT_TOKENS,
        load_s: float = 0.0,
        lockstep: Lockstep | None = None,
    ):
        config = checkpoint.config
        draft_tokens = check_speculation(speculate, speculate_tokens)
        replicas = 1 if checkpoint.mesh is None else replicas_of(checkpoint.mesh)
        check_sizes(config, context, slots, replicas)
        check_max_queue(max_queue)
        context = config.max_seq_len if context is None else context
        tokenizer = checkpoint.tokenizer and Tokenizer(checkpoint.tokenizer)
        if tokenizer:
            check_vocabulary(tokenizer.vocab_size, config.vocab_size, str(checkpoint.tokenizer))
        self.config = config
        self.dtype = checkpoint.dtype
        self.tokenizer = tokenizer
        self.load_s = load_s
        self.executor = Executor(
            config,
            checkpoint.params,
            checkpoint.dtype,
            batch=slots,
            context=context,
            plan=choose_plan(config, checkpoint.dtype, determinism).speculating(draft_tokens),
            drawable=tokenizer and tokenizer.vocab_size,
            mesh=checkpoint.mesh,
            lockstep=lockstep,
        )
        self.engine = Engine(
            self.executor,
            tokenizer,
            environment=describe(checkpoint, self.executor),
            max_queue=max_queue,
            reuse=reuse,
            drafter=open_drafter(speculate, self.executor, checkpoint, determinism),
        )

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | None = None,
        *,
        dtype: DTypeLike | None = None,
        context: int | None = None,
        slots: int = 1,
        max_queue: int | None = None,
        determinism: str = "strict",
        devices: int | str = 1,
        replicas: int = 1,
        eos_tokens: Sequence[int] | None = None,
        speculate: str | os.PathLike[str] | None = OFF,
        speculate_tokens: int = DEFAULT_TOKENS,
        verify: bool = False,
        convert: bool = False,
        progress: bool = False,
        lockstep: Lockstep | None = None,
    ) -> "Llama":
        """Restore a checkpoint.

        Programs are compiled at their first use. `use_compile_cache` keeps them for later runs.

        Args:
            path: what `python -m convert` wrote; None: `default_checkpoint()`.
            dtype: float16, bfloat16 or float32, in any form that JAX takes, for weights and
                cache; None: as stored.
            context: tokens of prompt plus output to hold, at most (and by default) the model's
                max_seq_len. A smaller cache takes less memory.
            slots: answers to draw at once, a multiple of `replicas`; each has a cache of `context`
                tokens.
            max_queue: requests that may wait beyond those; None: any number.
            determinism: `strict`: a request's tokens depend neither on `slots` nor on the others;
                `fast`: on a GPU or TPU, or a CPU without the kernels, they may.
            devices: how many to split the model over, or "all"; see `find_devices`. A request's
                tokens do not depend on it with the CPU kernels; elsewhere see docs/scaling.md.
            replicas: copies of the model, which share the slots, and each of which has so many
                devices; with "all", all of this machine's are shared equally. A request's tokens
                depend on it as on `devices`.
            eos_tokens: ids that end an answer, in place of the checkpoint's.
            speculate: what drafts tokens, several of which are verified in one pass: "ngram" (the
                text itself), the path of a checkpoint of the same vocabulary, or "off". The tokens
                are the same; see docs/reproducibility.md.
            speculate_tokens: drafts of a pass at most, 1 to 15.
            convert: take Hugging Face's or Meta's folder, or hf://ORG/NAME, too. It is converted
                once, into the user's cache (docs/checkpoints.md).
            verify: first compare all weights with the checkpoint's digests.
            progress: say on stderr what memory it takes, if much, and how far it is, if slow.
            lockstep: tells other processes of each call; see `hosts.Leader`. None: there are none,
                or they make the same calls by themselves.

        Raises:
            InputError: see `load_checkpoint`; context out of range; a tokenizer of another model;
                no room for weights and caches on the devices; not so many devices, or the model
                cannot be split over them; slots that the replicas cannot share equally.
        """
        began = time.perf_counter()
        path = find_checkpoint(path, dtype, convert=convert, progress=progress)
        # Before the weights: a mistake should not take a minute to show.
        manifest, config = open_checkpoint(path)
        check_replicas(replicas)
        check_sizes(config, context, slots, replicas)
        check_max_queue(max_queue)
        dtype = choose_dtype(dtype, manifest["dtype"])
        draft_tokens = check_speculation(speculate, speculate_tokens)
        plan = choose_plan(config, dtype, determinism).speculating(draft_tokens)
        mesh = find_mesh(config, devices, replicas)
        say(check_fits(config, plan, slots, context or config.max_seq_len, mesh), shown=progress)
        if eos_tokens is not None:
            config = dataclasses.replace(config, eos_tokens=tuple(eos_tokens))
        checkpoint = load_checkpoint(path, dtype, mesh=mesh, verify=verify, progress=progress)
        checkpoint = dataclasses.replace(checkpoint, config=config)
        jax.block_until_ready(checkpoint.params)
        load_s = time.perf_counter() - began
        sizes = {"context": context, "slots": slots, "max_queue": max_queue}
        how = {"determinism": determinism, "speculate": speculate, "lockstep": lockstep}
        return cls(checkpoint, **sizes, **how, speculate_tokens=speculate_tokens, load_s=load_s)

    @property
    def context(self) -> int:
        """Tokens of prompt plus output that fit."""
        return self.executor.context

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that a device reads for one decoded token."""
        return self.executor.weight_bytes_per_token

    def generate(self, **request: Any) -> Result:
        """Generate a whole answer.

        Args:
            **request: prompt, messages or prompt_tokens, and the parameters; see `make_request`.

        Raises:
            InputError: naming what is wrong with the request, or that it does not fit the context.
            QueueFullError: `max_queue` requests wait already.
        """
        return read_all(self.start(make_request(**request)))

    def stream(self, **request: Any) -> Stream:
        """Generate piece by piece: the same tokens and text as `generate`.

        A piece ends where a character ends. Without a tokenizer the text is the ids, with commas.
        The request is checked here, before the first piece is read.
        """
        return self.start(make_request(**request), streamed=True)

    def start(self, request: GenerationRequest, *, streamed: bool = False) -> Stream:
        """Generate from a request that is checked already. Streamed: see `Bursts`."""
        return Stream(self.engine, self.engine.submit(request, streamed=streamed), self.load_s)

    def generate_all(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Generate for many requests, as many at once as there are slots; yield in their order.

        The tokens are those of each request alone (docs/design.md, Exactness). Requests are taken
        one by one as slots get free.

        Args:
            requests: see `Request`.

        Raises:
            InputError: see `generate`; in the place of the result.
        """
        submissions = (functools.partial(self._submit, request) for request in requests)
        for error, stream in finish_in_order(self.engine, submissions):
            if stream is None:
                assert error is not None
                raise error
            yield read_all(stream)

    def _submit(self, request: Request) -> tuple[InputError | None, Stream | None]:
        try:
            if isinstance(request, GenerationRequest):
                return None, self.start(request)
            return None, self.start(make_request(**request))
        except InputError as error:
            return error, None

    def score(
        self,
        text: Text,
        continuation: Text | None = None,
        *,
        stride: int | None = None,
        parse_control: bool = False,
        progress: bool = False,
    ) -> Score:
        """Return the log-likelihood of a text, or of a continuation of it.

        A text follows BOS, which is not scored. A text longer than the context is read in windows
        of that size; those after the first begin inside the text, without BOS.

        Args:
            text: text, or token ids that are used as they are: the first is not scored.
            continuation: of the same kind. Only its tokens are scored. Text is encoded together
                with the text before it, whose last spaces count to the continuation, as in
                lm-evaluation-harness.
            stride: tokens from the begin of a window to that of the next, 1 to the context. A
                smaller one gives each token more context, and takes longer. None: half the context.
            parse_control: see `make_request`; for text only.
            progress: show a bar on stderr if it takes over a second.

        Raises:
            InputError: nothing to score, a stride out of range, or see `Engine.submit`.
        """
        request = self.score_request(text, continuation, stride=stride, parse_control=parse_control)
        streams = map(self.start, request.requests)
        bar = progress_bar(request.windows, unit="window", shown=progress)
        return request.score(read_all(next(streams)) for _ in bar)

    def score_request(
        self,
        text: Text,
        continuation: Text | None = None,
        *,
        stride: int | None = None,
        parse_control: bool = False,
    ) -> ScoreRequest:
        """Return what `score` runs: generations of no tokens, and what makes a score of them."""
        return make_score_request(
            text,
            continuation,
            stride=stride,
            parse_control=parse_control,
            context=self.context,
            tokenizer=self.tokenizer,
            vocab_size=self.config.vocab_size,
        )

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
        return self.engine.between_turns(lambda executor: executor.logits(token_ids))
