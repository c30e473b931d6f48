# pyright: reportMissingImports=false
# (httpx, httpx-sse and tokenizers come with the bench extra, which type checks do not need)
"""The servers that can be measured: what each reads, how it is started and asked."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from benchmarks import machine
from benchmarks.checkpoints import make_source
from benchmarks.worker import ROOT, EngineError, jax_settings
from llama_jax.card import schemas as card
from llama_jax.config import ModelConfig

PEERS = {
    "llamacpp": ("llama_cpp", "gguf", "sse_starlette", "starlette_context"),
    "llama-server": ("llama_cpp", "gguf"),
    "hf": ("torch", "transformers", "fastapi", "uvicorn", "openai"),
}
"""Each peer and the modules that this interpreter must have for it."""

READY_S = 600
"""Seconds that a server may take to load and compile."""
CLOSE_S = 20
"""Seconds that it may take to end."""

FIRST_CHARACTER = 0x20000
SPECIAL = ("<unk>", "<s>", "</s>")


def text_of(tokens: Sequence[int]) -> str:
    """Return ids as text, of one character each, so that its length in tokens is known.

    Random weights have a vocabulary of characters of CJK Extension B, none of which combine.
    """
    return "".join(chr(FIRST_CHARACTER + token) for token in tokens)


def pieces(vocab_size: int) -> list[str]:
    """Return the text of each id of that vocabulary."""
    return [*SPECIAL, *text_of(range(len(SPECIAL), vocab_size))]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One server to start."""

    program: str
    """ours, or one of PEERS."""
    dtype: str
    config: ModelConfig
    checkpoint: str | None
    """Folder of weights for ours; None: random ones. Peers' are always random."""
    folder: pathlib.Path
    """Of the files that are made up."""
    slots: int
    context: int
    """Tokens of prompt plus output that a slot holds."""
    binary: str | None = None
    """Of llama-server."""

    def __str__(self) -> str:
        return f"{self.program}:{self.dtype}"

    @property
    def batches(self) -> bool:
        """Whether it decodes several requests at once."""
        return self.program != "llamacpp"

    @property
    def reads(self) -> str:
        """What its prompts are given as."""
        as_text = self.program in ("llamacpp", "hf")
        return "text of as many tokens" if as_text else "token ids"

    @property
    def weights(self) -> pathlib.Path:
        """The file or folder of its weights."""
        if self.program == "ours" and self.checkpoint is not None:
            return pathlib.Path(self.checkpoint)
        return self.folder / {"ours": "checkpoint", "hf": "source"}.get(self.program, "gguf")

    def write(self) -> None:
        """Make its weights up, if they are not there yet."""
        source = self.folder / "source"
        if self.weights.exists() and self.program != "hf":
            return
        if self.program in ("ours", "hf") and not source.exists():
            make_source(source, self.config, self.dtype)
            _write_sentencepiece(source / "tokenizer.model", self.config.vocab_size)
        if self.program == "ours":
            command = [sys.executable, "-m", "convert", "hf", str(source), str(self.weights)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        elif self.program == "hf":
            _write_tokenizer(source, self.config.vocab_size)
        else:
            from benchmarks.engines import llamacpp

            config = dataclasses.asdict(self.config)
            llamacpp.write_gguf(self.weights, config, self.dtype, pieces(self.config.vocab_size))

    def command(self, port: int) -> list[str]:
        """Return the command that starts it."""
        weights, cores = str(self.weights), str(machine.cores())
        if self.program == "ours":
            return [
                *(sys.executable, "run.py", "serve", f"--checkpoint={weights}", f"--port={port}"),
                *(f"--dtype={self.dtype}", f"--slots={self.slots}", f"--context={self.context}"),
            ]
        if self.program == "llamacpp":
            return [
                *(sys.executable, "-m", "llama_cpp.server", "--model", weights),
                *("--port", str(port), "--n_ctx", str(self.context)),
                *("--n_threads", cores, "--n_threads_batch", cores),
                # By default a new request ends the running one, and all tokens' logits are kept.
                *("--interrupt_requests", "false", "--logits_all", "false", "--verbose", "false"),
            ]
        if self.program == "llama-server":
            return [
                *(str(self.binary), "--model", weights, "--port", str(port)),
                *("--parallel", str(self.slots), "--ctx-size", str(self.context * self.slots)),
                *("--threads", cores, "--threads-batch", cores, "--cont-batching", "--no-webui"),
            ]
        return [
            *(sys.executable, "-m", "transformers.cli.transformers", "serve", weights),
            *("--port", str(port), "--device", "cpu", "--dtype", self.dtype),
            *("--host", "127.0.0.1", "--continuous-batching"),
        ]

    def body(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Return a request to /v1/completions: greedy, streamed."""
        common = {"max_tokens": new_tokens, "temperature": 0, "stream": True}
        common["stream_options"] = {"include_usage": True}
        if self.program == "ours":
            return common | {"model": card.MODEL, "prompt": list(prompt), "ignore_eos": True}
        if self.program == "llama-server":
            return common | {"prompt": list(prompt), "ignore_eos": True}
        return common | {"model": str(self.weights), "prompt": text_of(prompt)}


def _write_sentencepiece(path: pathlib.Path, vocab_size: int) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore (generated, untyped)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}  # unknown, control; else normal
    for piece in pieces(vocab_size):
        model.pieces.add(piece=piece, score=0.0, type=kinds.get(piece, 1))
    model.trainer_spec.model_type = model.trainer_spec.CHAR
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())


def _write_tokenizer(folder: pathlib.Path, vocab_size: int) -> None:
    """Write what transformers loads a tokenizer from; let no token end an answer."""
    import tokenizers
    import transformers

    ids = {piece: token for token, piece in enumerate(pieces(vocab_size))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token=SPECIAL[0]))
    model.decoder = tokenizers.decoders.Fuse()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, clean_up_tokenization_spaces=False, **names
    ).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": None}), "utf-8")


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs."""

    launch: Launch
    url: str
    process: subprocess.Popen

    def check(self) -> None:
        """Raise EngineError if it has ended."""
        status = self.process.poll()
        if status is not None:
            killed = " (killed: perhaps out of memory)" if status == -9 else ""
            raise EngineError(f"{self.launch}: the server ended with status {status}{killed}")


@contextlib.contextmanager
def running(launch: Launch, log: BinaryIO) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        launch.command(port),
        cwd=ROOT,
        env=os.environ | jax_settings() | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C is for the orchestrator, which then ends its servers
    )
    try:
        server = Server(launch, f"http://127.0.0.1:{port}", process)
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: Server) -> None:
    import httpx

    until = time.monotonic() + READY_S
    body = server.launch.body([5, 7, 11], 1)
    said = ""
    while time.monotonic() < until:
        server.check()
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=READY_S)
            if reply.status_code == 200:
                return
            said = reply.text[:200]
        time.sleep(0.1)
    raise EngineError(f"{server.launch}: no token after {READY_S} s; {said}")
