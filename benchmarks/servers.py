# pyright: reportMissingImports=false
# (httpx, httpx-sse and tokenizers come with the bench extra, which type checks do not need)
"""The servers that can be measured: what each reads, how it is started and asked."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from benchmarks import machine
from benchmarks.checkpoints import make_source
from benchmarks.engines.protocol import SPECIAL, pieces, text_of
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
    binary: str = "llama-server"
    more: tuple[str, ...] = ()
    """Further flags of ours."""

    def __str__(self) -> str:
        return f"{self.program}:{self.dtype}"

    @property
    def weights(self) -> str:
        """The file or folder of its weights."""
        if self.program == "ours" and self.checkpoint is not None:
            return self.checkpoint
        return str(self.folder / {"ours": "checkpoint", "hf": "source"}.get(self.program, "gguf"))

    def write(self) -> None:
        """Make its weights up."""
        source, vocab_size = self.folder / "source", self.config.vocab_size
        if self.program in ("llamacpp", "llama-server"):
            from benchmarks.engines import llamacpp

            config = dataclasses.asdict(self.config)
            llamacpp.write_gguf(pathlib.Path(self.weights), config, self.dtype)
        elif self.program == "hf" or self.checkpoint is None:
            if not source.exists():
                make_source(source, self.config, self.dtype)
                _write_sentencepiece(source / "tokenizer.model", vocab_size)
            if self.program == "hf":
                _write_tokenizer(source, vocab_size)
            else:
                command = [sys.executable, "-m", "convert", "hf", str(source), self.weights]
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def command(self, port: int) -> list[str]:
        """Return the command that starts it."""
        cores, model = machine.cores(), shlex.quote(self.weights)
        if self.program == "ours":
            line = f"{sys.executable} run.py serve --checkpoint={model} --port={port}"
            line += f" --dtype={self.dtype} --slots={self.slots} --context={self.context}"
        elif self.program == "llamacpp":
            line = f"{sys.executable} -m llama_cpp.server --model {model} --port {port}"
            line += f" --n_ctx {self.context} --n_threads {cores} --n_threads_batch {cores}"
            # By default a new request ends the running one, and all tokens' logits are kept.
            line += " --interrupt_requests false --logits_all false --verbose false"
        elif self.program == "llama-server":
            line = f"{shlex.quote(self.binary)} --model {model} --port {port} --no-webui"
            line += f" --parallel {self.slots} --ctx-size {self.context * self.slots}"
            line += f" --threads {cores} --threads-batch {cores} --cont-batching"
        else:
            line = f"{sys.executable} -m transformers.cli.transformers serve {model} --port {port}"
            line += f" --host 127.0.0.1 --device cpu --dtype {self.dtype} --continuous-batching"
        return [*shlex.split(line), *self.more]

    def body(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Return a request to /v1/completions: greedy, streamed."""
        common = {"max_tokens": new_tokens, "temperature": 0, "stream": True}
        common["stream_options"] = {"include_usage": True}
        if self.program in ("ours", "llama-server"):
            own = {"ignore_eos": True, "add_special_tokens": False}
            return common | {"model": card.MODEL, "prompt": list(prompt), **own}
        return common | {"model": self.weights, "prompt": text_of(prompt)}


def _write_sentencepiece(path: pathlib.Path, vocab_size: int) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore (generated, untyped)
    kinds = [2, 3, 3] + [1] * (vocab_size - len(SPECIAL))  # unknown, control; then normal
    for piece, kind in zip(pieces(vocab_size), kinds, strict=True):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    path.write_bytes(model.SerializeToString())


def _write_tokenizer(folder: pathlib.Path, vocab_size: int) -> None:
    """Write what transformers loads a tokenizer from; let no token end an answer."""
    import tokenizers
    import transformers

    ids = {piece: token for token, piece in enumerate(pieces(vocab_size))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token=SPECIAL[0]))
    model.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": None}), "utf-8")


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs."""

    launch: Launch
    url: str


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
        server = Server(launch, f"http://127.0.0.1:{port}")
        _wait_until_ready(server, process)
        yield server
        if process.poll() is not None:
            raise EngineError(f"{launch}: the server ended with status {process.returncode}")
    finally:
        process.terminate()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen) -> None:
    import httpx

    body = server.launch.body([5, 7, 11], 1)
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=READY_S)
            if reply.status_code == 200:
                return
        time.sleep(0.1)
    raise EngineError(f"{server.launch}: no token, status {process.poll()}; see the log")
